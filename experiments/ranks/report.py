"""What the study of ranks found: as metrics, as tables, as a picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.console import device_name
from experiments.common.evaluation import Evaluation
from experiments.common.run import Run
from experiments.common.stores import Result
from experiments.common.tables import Table
from experiments.data.dataset import Dataset
from experiments.data.images import CLASSES
from experiments.ranks.cells import Cell, FineTuning, StepTimes
from experiments.ranks.methods import METHODS
from experiments.ranks.options import GridOptions, Options


@dataclass(frozen=True)
class Findings:
    """Everything that the study measured."""

    dataset: Dataset
    digit: int
    base: Evaluation
    results: Mapping[Cell, Result]

    def wrong(self, method: str, rank: int) -> list[int]:
        """Returns the wrong answers on the tuned digit, a number for each repetition."""
        return [result["wrong_counts"][self.digit] for result in self._fine_tunings(method, rank)]

    def accuracy(self, method: str, rank: int) -> list[float]:
        """Returns the accuracy on all digits, a number for each repetition."""
        return [result["accuracy"] for result in self._fine_tunings(method, rank)]

    def trainable(self, method: str, rank: int) -> int:
        return self._fine_tunings(method, rank)[0]["trainable"]

    def milliseconds(self, method: str, rank: int) -> float:
        return self._step_times(rank)["milliseconds"][method]

    def relative_time(self, method: str, rank: int) -> float:
        """Returns the time of a step, in multiples of that of LoRA of rank 1."""
        return self._step_times(rank)["relative_time"][method]

    def metrics(self, options: Options) -> dict[str, Any]:
        """Returns what metrics.json holds, besides the seconds of each phase."""
        grid, training = options.grid, options.training
        return {
            "dataset": self.dataset.name,
            "device": device_name(),
            "digit": self.digit,
            "test_images_of_digit": int(np.sum(self.base.labels == self.digit)),
            "seed": training.seed,
            "repeats": grid.repeats,
            "alpha": grid.alpha,
            "lora_plus_ratio": grid.lora_plus_ratio,
            "replay": training.replay,
            "batch_size": training.batch_size,
            "finetune_batches": training.finetune_batches,
            "learning_rate": training.learning_rate,
            "base": {
                "accuracy": self.base.accuracy,
                "wrong_counts": self.base.wrong_counts(CLASSES),
            },
            "cells": [
                {
                    "rank": rank,
                    "method": method,
                    "trainable": self.trainable(method, rank),
                    "wrong": self.wrong(method, rank),
                    "accuracy": self.accuracy(method, rank),
                    "milliseconds": self.milliseconds(method, rank),
                    "relative_time": self.relative_time(method, rank),
                }
                for rank in grid.ranks
                for method in grid.methods
            ],
        }

    def _fine_tunings(self, method: str, rank: int) -> list[Result]:
        return [
            result
            for cell, result in self.results.items()
            if isinstance(cell, FineTuning) and (cell.method, cell.rank) == (method, rank)
        ]

    def _step_times(self, rank: int) -> Result:
        return next(
            result
            for cell, result in self.results.items()
            if isinstance(cell, StepTimes) and cell.rank == rank
        )


def present(findings: Findings, options: Options, run: Run) -> None:
    """Prints the tables and finishes the run."""
    metrics = findings.metrics(options)
    for table in tables(metrics):
        table.show(run.console)
    run.console.note(_lesson(findings, options.grid))
    run.finish(metrics, draw=lambda folder: _save_plot(findings, options, folder))


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Returns what `Findings.metrics` has of the cells: a column for each rank."""
    digit, repeats = metrics["digit"], metrics["repeats"]
    before = metrics["base"]["wrong_counts"][digit]
    times = f"mean of {repeats}; in brackets the least and the most"
    if repeats == 1:
        times = "one fine-tuning each"
    return [
        _by_rank(
            f"Wrong answers on digit {digit}; the base: {before} ({times})",
            metrics["cells"],
            lambda cell: _mean_and_range(cell["wrong"]),
        ),
        _by_rank(
            f"Accuracy on all digits; the base: {metrics['base']['accuracy']:.4f} (mean)",
            metrics["cells"],
            lambda cell: f"{np.mean(cell['accuracy']):.4f}",
        ),
        _by_rank("Trainable numbers", metrics["cells"], lambda cell: f"{cell['trainable']:,}"),
        _by_rank(
            "Time of a training step, in those of LoRA of rank 1 (and in milliseconds)",
            metrics["cells"],
            lambda cell: f"{cell['relative_time']:.2f}× ({cell['milliseconds']:.2f})",
        ),
    ]


def _by_rank(
    title: str, cells: Sequence[Mapping[str, Any]], text: Callable[[Mapping[str, Any]], str]
) -> Table:
    texts = {(cell["method"], cell["rank"]): text(cell) for cell in cells}
    methods, ranks = (list(dict.fromkeys(key)) for key in zip(*texts, strict=True))
    rows = [[METHODS[name].label, *(texts[name, rank] for rank in ranks)] for name in methods]
    return Table(title, ["", *(f"rank {rank}" for rank in ranks)], rows)


def _mean_and_range(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return f"{mean} ({min(values)}–{max(values)})" if len(values) > 1 else str(values[0])


def _lesson(findings: Findings, grid: GridOptions) -> str:
    """Returns what the tables show, and how much of it may be chance."""
    pairs = [(method, rank) for method in grid.methods for rank in grid.ranks]
    means = {pair: float(np.mean(findings.accuracy(*pair))) for pair in pairs}
    best = max(pairs, key=means.__getitem__)
    best_text = f"Highest accuracy: {means[best]:.4f}, {METHODS[best[0]].label} at rank {best[1]}."
    if grid.repeats == 1:
        return f"{best_text} --repeats 3 shows how much of it is chance."
    spread = max(np.ptp(findings.accuracy(*pair)) for pair in pairs)
    return f"{best_text} Repetitions of one cell differ by up to {spread:.4f}."


def _save_plot(findings: Findings, options: Options, folder: Path) -> None:
    # Matplotlib takes half a second to import, which --no-plots saves.
    from experiments.ranks.plots import Panel, save_rank_curves

    digit, grid, replay = findings.digit, options.grid, options.training.replay

    def curves(values: Callable[[str, int], Sequence[float]]) -> dict[str, list[Sequence[float]]]:
        return {
            METHODS[method].label: [values(method, rank) for rank in grid.ranks]
            for method in grid.methods
        }

    before = findings.base.wrong_counts(CLASSES)[digit]
    share = f", {replay:.0%} other digits" if replay else ""
    save_rank_curves(
        folder / "rank_study.png",
        grid.ranks,
        [
            Panel(
                f"wrong answers on digit {digit}\n({before} before fine-tuning)",
                curves(findings.wrong),
            ),
            Panel(
                f"accuracy on all digits\n({findings.base.accuracy:.4f} before fine-tuning)",
                curves(findings.accuracy),
            ),
            Panel(
                "time of a training step\n(1 = LoRA of rank 1)",
                curves(lambda method, rank: [findings.relative_time(method, rank)]),
            ),
        ],
        title=f"Rank and variant: fine-tuned on digit {digit} of {findings.dataset.name}{share}, "
        f"alpha {grid.alpha:g}",
    )
