"""Which studies are stored, and what the documentation shows of each."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import Table
from experiments.common.memory import MEGABYTE
from experiments.llm.rouge import KINDS, Score

Found = Mapping[str, Any]

_TUNED = {"lora": "LoRA", "full": "full fine-tuning"}
_ROUGE = ("ROUGE-1", "ROUGE-2", "ROUGE-L")


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


# --- MNIST -------------------------------------------------------------------------------------


def _mnist(runs: Sequence[Found]) -> list[Table]:
    return [_wrong_answers(runs[0]), _with_replay(runs), _inference(runs[0])]


def _wrong_answers(found: Found) -> Table:
    counts = {name: found[name] for name in ("base", "adapted", "disabled", "merged", "restored")}
    digits = [str(digit) for digit in range(len(found["base"]["wrong_counts"]))]
    rows = [
        [name, f"{each['accuracy']:.4f}", *map(str, each["wrong_counts"])]
        for name, each in counts.items()
    ]
    return Table("Wrong answers, by digit", ["", "accuracy", *digits], rows)


def _with_replay(runs: Sequence[Found]) -> Table:
    digit, base = runs[0]["digit"], runs[0]["base"]
    rows = [_accuracies("base", base, digit)]
    for share, found in zip((0, *_REPLAYS), runs, strict=True):
        name = f"adapted, `--replay {share}`" if share else f"adapted, digit {digit} only"
        rows.append(_accuracies(name, found["adapted"], digit))
    header = ["", "accuracy", f"wrong {digit}s", "other wrong answers"]
    return Table(f"Fine-tuned on digit {digit}, with a share of other digits", header, rows)


def _accuracies(name: str, found: Found, digit: int) -> list[str]:
    counts = found["wrong_counts"]
    return [
        name,
        f"{found['accuracy']:.4f}",
        f"{counts[digit]}",
        f"{sum(counts) - counts[digit]:,}",
    ]


def _inference(found: Found) -> Table:
    milliseconds = found["milliseconds"]
    rows = [
        [name, f"{each:.3f}", f"{each / milliseconds['base']:.2f}×"]
        for name, each in milliseconds.items()
    ]
    return Table("Inference", ["", "milliseconds per batch", "of the base's"], rows)


_REPLAYS = (0.5, 0.9)

# --- ranks -------------------------------------------------------------------------------------


def _ranks(runs: Sequence[Found]) -> list[Table]:
    (found,) = runs
    digit = found["digit"]
    wrong = found["base"]["wrong_counts"][digit]
    return [
        _by_rank(
            found,
            f"Wrong answers on digit {digit}, of {found['test_images_of_digit']} ({wrong} before): "
            f"the mean of {found['repeats']}, the least and the most",
            lambda cell: _mean_and_range(cell["wrong"]),
        ),
        _by_rank(
            found,
            f"Accuracy on all digits ({found['base']['accuracy']:.4f} before), the mean",
            lambda cell: f"{np.mean(cell['accuracy']):.4f}",
        ),
        _by_rank(found, "Trainable numbers", lambda cell: f"{cell['trainable']:,}"),
        _by_rank(
            found,
            "Time of a training step, in those of LoRA of rank 1",
            lambda cell: f"{cell['relative_time']:.2f}",
        ),
    ]


def _by_rank(found: Found, title: str, text: Callable[[Found], str]) -> Table:
    cells = {(cell["method"], cell["rank"]): cell for cell in found["cells"]}
    methods, ranks = (list(dict.fromkeys(key)) for key in zip(*cells, strict=True))
    rows = [[method, *(text(cells[method, rank]) for rank in ranks)] for method in methods]
    return Table(title, ["", *(f"rank {rank}" for rank in ranks)], rows)


def _mean_and_range(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} ({min(values)}–{max(values)})"


# --- text --------------------------------------------------------------------------------------


def _text(runs: Sequence[Found]) -> list[Table]:
    (found,) = runs
    accuracy, counts = found["accuracy"], found["parameters"]
    accuracies = [
        ["adapters on", f"{accuracy['on']:.4f}"],
        [
            "adapters off: the same head, which was trained beside them, on frozen features",
            f"{accuracy['off']:.4f}",
        ],
        [
            "merged into the weights",
            f"{accuracy['merged']:.4f}; {found['merged_predictions_alike']:.0%} predicted alike",
        ],
    ]
    costs = [
        ["trainable numbers", f"{counts['trainable']:,} ({counts['percent']:.3f} %)"],
        ["adapter, with its head", f"{found['bytes']['adapter'] / MEGABYTE:.2f} MB"],
        ["model", f"{found['bytes']['model'] / MEGABYTE:.2f} MB"],
        ["peak memory", f"{found['peak_bytes'] / MEGABYTE:,.0f} MB"],
        ["memory of the longest step", f"{found['step_bytes'] / MEGABYTE:,.0f} MB"],
        ["steps per second", f"{found['steps_per_second']:.2f}"],
        ["time to merge", f"{1e3 * found['merge_seconds']:.0f} ms"],
    ]
    title = f"{found['examples']['test']:,} test sentences"
    return [
        Table(title, ["", "accuracy"], accuracies),
        Table("What it costs", ["", "measured"], costs),
    ]


def _text_methods(runs: Sequence[Found]) -> list[Table]:
    (found,) = runs
    rows = [
        [
            row["method"],
            f"{row['trainable']:,}",
            f"{row['mean']:.4f} ± {row['deviation']:.4f}",
            f"{row['step_bytes'] / MEGABYTE:,.0f} MB",
            f"{row['steps_per_second']:.2f}",
        ]
        for row in found["methods"]
    ]
    examples = found["examples"]
    title = f"{examples['train']:,} training sentences, seeds: {len(found['seeds'])}"
    header = ["method", "trainable", "accuracy", "memory of a step", "steps per second"]
    return [Table(title, header, rows)]


# --- a language model --------------------------------------------------------------------------


def _llm(runs: Sequence[Found]) -> list[Table]:
    training, answers = runs
    return [_answers(training, answers), _llm_costs(training)]


def _answers(training: Found, answers: Found) -> Table:
    rows = []
    for (name, own), held_out in zip(answers["rouge"].items(), ("off", "on"), strict=True):
        loss = training["held_out"][held_out]
        scores = [str(Score(**own[kind])) for kind in KINDS]
        rows.append([name, f"{loss['loss']:.3f}", f"{loss['perplexity']:.2f}", *scores])
    title = (
        f"{training['examples']['train']} dialogues to learn from, {answers['answers']} to answer: "
        "means with 95 % confidence"
    )
    return Table(title, ["", "held-out loss", "perplexity", *_ROUGE], rows)


def _llm_costs(found: Found) -> Table:
    counts, seconds = found["parameters"], found["seconds"]
    rows = [
        ["trainable numbers", f"{counts['trainable']:,} ({counts['percent']:.3f} %)"],
        ["adapter", f"{found['adapter_bytes'] / MEGABYTE:.2f} MB"],
        [
            "memory of a step: arguments and temporaries",
            f"{found['step_bytes'] / MEGABYTE:,.0f} MB",
        ],
        ["peak memory of the process", f"{found['peak_bytes'] / MEGABYTE:,.0f} MB"],
        ["tokens a second", f"{found['tokens_per_second']:.0f}"],
        ["seconds in all", f"{seconds['total']:.0f}"],
    ]
    title = f"{found['steps']} steps of 2 rows, {found['fullness']:.0%} full"
    return Table(title, ["", "measured"], rows)


# --- pictures ----------------------------------------------------------------------------------


def _images(runs: Sequence[Found]) -> list[Table]:
    (found,) = runs
    return [_recognised(found), _costs(found)]


def _recognised(found: Found) -> Table:
    held_out = [str(digit) for digit in found["base"]["held_out"]]
    rows = []
    for name, shares in found["recognised"].items():
        others = [share for digit, share in shares.items() if digit not in held_out]
        own = [f"{shares[digit]:.0%}" for digit in held_out]
        rows.append([name, *own, f"{sum(others) / len(others):.0%}"])
    title = f"Recognised by a classifier that is right on {found['classifier_accuracy']:.1%}"
    return Table(title, ["", *(f"{digit}, held out" for digit in held_out), "the others"], rows)


def _costs(found: Found) -> Table:
    header = ["", "trainable", "seconds", "memory of a step", "stored"]
    return Table("What learning a digit costs", header, list(_cost_rows(found)))


def _cost_rows(found: Found) -> Iterator[list[str]]:
    for digit, costs in found["costs"].items():
        for name, cost in costs.items():
            stored = (
                found["adapter_bytes"][digit]["diffusers"]
                if name == "lora"
                else 4 * found["base_parameters"]
            )
            yield [
                f"{digit}, {_TUNED[name]}",
                f"{cost['trainable']:,}",
                f"{cost['seconds']:.0f}",
                f"{cost['step_bytes'] / MEGABYTE:,.0f} MB",
                f"{stored / MEGABYTE:,.1f} MB",
            ]


_MNIST = ("experiments.mnist_lora", "--rank", "1")
_LLM = ("experiments.llm_lora",)
_DIALOGSUM = ("--data", "dialogsum")
STUDIES: Mapping[str, Study] = {
    "mnist": Study(
        [Call(_MNIST), *(Call((*_MNIST, "--replay", str(share))) for share in _REPLAYS)], _mnist
    ),
    "ranks": Study([Call(("experiments.rank_study",))], _ranks),
    "text": Study([Call(("experiments.text_lora", "--rank", "8"))], _text),
    "text_methods": Study(
        [
            Call(
                ("experiments.text_lora", "--seeds", "3", "--train-examples", "2000"),
                file="comparison.json",
            )
        ],
        _text_methods,
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
    "images": Study([Call(("experiments.image_lora",))], _images),
}
