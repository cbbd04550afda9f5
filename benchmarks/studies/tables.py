"""Which studies are stored, and what the documentation shows of each."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common.tables import Table
from experiments.images import report as images
from experiments.llm import evaluating
from experiments.llm import report as llm
from experiments.ranks import report as ranks
from experiments.text import comparison
from experiments.text import report as text

Found = Mapping[str, Any]

# Of other digits in the batches of the MNIST study; without them it shows one digit alone.
_REPLAYS = (0.5, 0.9)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a study.

    Attributes:
      arguments: the module and its options but `--out`; `{out}` is the folder of the study.
      out: where it writes, in that folder.
      file: the file of its numbers there.
    """

    arguments: tuple[str, ...]
    out: str = "."
    file: str = "metrics.json"

    def command(self, folder: Path) -> list[str]:
        """Returns the module and its options, for a folder."""
        given = [each.replace("{out}", str(folder)) for each in self.arguments]
        return [*given, "--out", str(folder / self.out)]

    def found_in(self, folder: Path) -> Path:
        """Returns the path of the file of numbers."""
        return folder / self.out / self.file


@dataclasses.dataclass(frozen=True)
class Study:
    """A study that is stored.

    Attributes:
      calls: what is called, in this order.
      tables: returns the documentation's tables of what each of them has written.
    """

    calls: Sequence[Call]
    tables: Callable[[Sequence[Found]], list[Table]]


def _with_replay(runs: Sequence[Found]) -> list[Table]:
    digit = runs[0]["digit"]
    names = [f"adapted, digit {digit} only", *(f"adapted, `--replay {each}`" for each in _REPLAYS)]
    found = {
        "base": runs[0]["base"],
        **{name: each["adapted"] for name, each in zip(names, runs, strict=True)},
    }
    rows = [
        [name, f"{each['accuracy']:.4f}", *_wrong(each["wrong_counts"], digit)]
        for name, each in found.items()
    ]
    header = ["", "accuracy", f"wrong {digit}s", "other wrong answers"]
    return [Table(f"Fine-tuned on digit {digit}, with a share of other digits", header, rows)]


def _wrong(counts: Sequence[int], digit: int) -> list[str]:
    return [f"{counts[digit]:,}", f"{sum(counts) - counts[digit]:,}"]


def _llm(runs: Sequence[Found]) -> list[Table]:
    training, answers = runs
    return [*llm.tables(training), *evaluating.tables(answers)]


def _only(tables: Callable[[Found], list[Table]]) -> Callable[[Sequence[Found]], list[Table]]:
    """Returns the tables of a study that is called once."""

    def of_one(runs: Sequence[Found]) -> list[Table]:
        (found,) = runs
        return tables(found)

    return of_one


_MNIST = ("experiments.mnist_lora", "--rank", "1")
_LLM = ("experiments.llm_lora",)
_DIALOGSUM = ("--data", "dialogsum")
STUDIES: Mapping[str, Study] = {
    "mnist": Study(
        [Call(_MNIST), *(Call((*_MNIST, "--replay", str(share))) for share in _REPLAYS)],
        _with_replay,
    ),
    "ranks": Study([Call(("experiments.rank_study",))], _only(ranks.tables)),
    "text": Study([Call(("experiments.text_lora", "--rank", "8"))], _only(text.tables)),
    "text_methods": Study(
        [
            Call(
                ("experiments.text_lora", "--seeds", "3", "--train-examples", "2000"),
                file="comparison.json",
            )
        ],
        _only(comparison.tables),
    ),
    "llm": Study(
        [
            Call((*_LLM, *_DIALOGSUM, "--train-examples", "100")),
            Call(
                (
                    *(*_LLM, "evaluate", *_DIALOGSUM, "--limit", "16", "--base"),
                    *("--adapter", "{out}/adapter"),
                ),
                out="answers",
            ),
        ],
        _llm,
    ),
    "images": Study([Call(("experiments.image_lora",))], _only(images.tables)),
}
