"""What the study of ranks found: as metrics, as tables, as a picture."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.cell_store import Result
from experiments.console import Console, device_name
from experiments.data import Dataset
from experiments.data.dataset import CLASSES
from experiments.evaluation import Evaluation
from experiments.output import write_json
from experiments.rank_cells import Cell, FineTuning, StepTimes
from experiments.rank_methods import METHODS
from experiments.rank_options import Options
from experiments.timing import Stopwatch


@dataclass(frozen=True)
class Findings:
    """Everything that the study measured."""

    dataset: Dataset
    digit: int
    base: Evaluation
    results: Mapping[Cell, Result]

    def wrong(self, method: str, rank: int) -> list[int]:
        """Returns the wrong answers on the tuned digit, one number for each repetition."""
        return [result["wrong_counts"][self.digit] for result in self._fine_tunings(method, rank)]

    def accuracy(self, method: str, rank: int) -> list[float]:
        """Returns the accuracy on all digits, one number for each repetition."""
        return [result["accuracy"] for result in self._fine_tunings(method, rank)]

    def trainable(self, method: str, rank: int) -> int:
        return self._fine_tunings(method, rank)[0]["trainable"]

    def milliseconds(self, method: str, rank: int) -> float:
        return self._step_times(rank)["milliseconds"][method]

    def relative_time(self, method: str, rank: int) -> float:
        """Returns how many times as long as one of LoRA of rank 1 a step takes."""
        return self._step_times(rank)["relative_time"][method]

    def metrics(self, options: Options, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Returns what metrics.json holds."""
        return {
            "dataset": self.dataset.name,
            "device": device_name(),
            "digit": self.digit,
            "test_images_of_digit": int(np.sum(self.base.labels == self.digit)),
            **{
                name: getattr(options, name)
                for name in (
                    "seed",
                    "repeats",
                    "alpha",
                    "lora_plus_ratio",
                    "replay",
                    "batch_size",
                    "finetune_batches",
                    "learning_rate",
                )
            },
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
                for rank in options.ranks
                for method in options.methods
            ],
            "seconds": dict(seconds),
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


def present(findings: Findings, options: Options, watch: Stopwatch, console: Console) -> None:
    """Prints the tables and writes the files."""
    _print_tables(findings, options, console)
    if not options.no_plots:
        _save_plot(findings, options)
        watch.phase_ended("plots")
    metrics = findings.metrics(options, watch.seconds())
    write_json(options.out / "metrics.json", metrics)
    console.note(f"Results are in {options.out} ({watch.seconds()['total']:.0f} seconds)")
    if options.json:
        print(json.dumps(metrics, indent=2))


def _print_tables(findings: Findings, options: Options, console: Console) -> None:
    digit = findings.digit
    before = findings.base.wrong_counts(CLASSES)[digit]
    times = f"mean of {options.repeats}; in brackets the least and the most"
    if options.repeats == 1:
        times = "one fine-tuning each"

    def table(title: str, text: Callable[[str, int], str]) -> None:
        console.rule(title)
        console.table(
            ["", *(f"rank {rank}" for rank in options.ranks)],
            [
                [METHODS[method].label, *(text(method, rank) for rank in options.ranks)]
                for method in options.methods
            ],
        )

    table(
        f"Wrong answers on digit {digit}; the base: {before} ({times})",
        lambda method, rank: _mean_and_range(findings.wrong(method, rank)),
    )
    table(
        f"Accuracy on all digits; the base: {findings.base.accuracy:.4f} (mean)",
        lambda method, rank: f"{np.mean(findings.accuracy(method, rank)):.4f}",
    )
    table("Trainable numbers", lambda method, rank: f"{findings.trainable(method, rank):,}")
    table(
        "Time of a training step, in those of LoRA of rank 1 (and in milliseconds)",
        lambda method, rank: (
            f"{findings.relative_time(method, rank):.2f}× "
            f"({findings.milliseconds(method, rank):.2f})"
        ),
    )
    console.note(_lesson(findings, options))


def _mean_and_range(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return f"{mean} ({min(values)}–{max(values)})" if len(values) > 1 else str(values[0])


def _lesson(findings: Findings, options: Options) -> str:
    """Returns what the tables show, and how far chance alone moves it."""
    pairs = [(method, rank) for method in options.methods for rank in options.ranks]
    means = {pair: float(np.mean(findings.accuracy(*pair))) for pair in pairs}
    best = max(pairs, key=means.__getitem__)
    best_text = f"Highest accuracy: {means[best]:.4f}, {METHODS[best[0]].label} at rank {best[1]}."
    if options.repeats == 1:
        return f"{best_text} --repeats 3 shows how far chance alone moves it."
    spread = max(np.ptp(findings.accuracy(*pair)) for pair in pairs)
    return f"{best_text} Repetitions of one cell differ by up to {spread:.4f}."


def _save_plot(findings: Findings, options: Options) -> None:
    # Matplotlib takes half a second to import, which --no-plots spares.
    from experiments.plots import Panel, save_rank_curves

    digit = findings.digit

    def curves(values: Callable[[str, int], Sequence[float]]) -> dict[str, list[Sequence[float]]]:
        return {
            METHODS[method].label: [values(method, rank) for rank in options.ranks]
            for method in options.methods
        }

    before = findings.base.wrong_counts(CLASSES)[digit]
    share = f", {options.replay:.0%} other digits" if options.replay else ""
    save_rank_curves(
        options.out / "rank_study.png",
        options.ranks,
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
        f"alpha {options.alpha:g}",
    )
