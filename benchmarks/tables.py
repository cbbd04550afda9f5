"""Tables for the terminal, and for the documentation."""

import dataclasses
from collections.abc import Sequence

from experiments.common.console import Console


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
        """Returns it as the documentation writes tables."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)
