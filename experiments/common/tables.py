"""Tables for the terminal, and for documents."""

import dataclasses
from collections.abc import Mapping, Sequence

from experiments.common.console import Console
from experiments.common.memory import MEGABYTE


@dataclasses.dataclass(frozen=True)
class Table:
    """A table, and what it is about.

    Attributes:
      title: what it is about.
      header: the names of the columns.
      rows: the cells of each row.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def show(self, console: Console) -> None:
        """Prints it."""
        console.rule(self.title)
        console.table(list(self.header), [list(row) for row in self.rows])

    def as_markdown(self) -> str:
        """Returns it as documents write tables."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def megabytes(size: float) -> str:
    """Returns a number of bytes as tables have it."""
    return f"{size / MEGABYTE:,.2f} MB"


def trainable(counts: Mapping[str, float]) -> str:
    """Returns how many of all numbers train, of what metrics.json has as `parameters`."""
    return f"{counts['trainable']:,} of {counts['total']:,} ({counts['percent']:.3f} %)"
