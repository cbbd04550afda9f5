"""What the comparison on text found: a table, a picture, and whether both compute the same."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import write_found
from benchmarks.peers.contender import (
    GREATEST_LOSS_DIFFERENCE,
    OURS,
    PEFT,
    check_losses,
    faster,
    loss_differences,
    versions,
)
from benchmarks.peers.text_contender import Exchange, TextContender
from experiments.common.console import Console
from experiments.common.memory import MEGABYTE
from experiments.common.tables import Table

_SIDES = (OURS, PEFT)


@dataclass(frozen=True)
class Findings:
    """Everything that was measured.

    Attributes:
      fixed: both after the first steps without dropout.
      trained: both after training with every seed.
      exchanges: for each, how its last adapter does on the other side.
      threads: how many each had.
      study_arguments: what the study would be called with.
    """

    fixed: Mapping[str, TextContender]
    trained: Mapping[str, TextContender]
    exchanges: Mapping[str, Exchange]
    threads: int
    study_arguments: Sequence[str]

    def loss_differences(self) -> np.ndarray:
        """Returns how far PEFT's losses without dropout are from ours, relative to ours."""
        return loss_differences(self.fixed[OURS], self.fixed[PEFT])

    def faster(self, contenders: Mapping[str, TextContender]) -> float:
        """Returns how many steps we take while PEFT takes one: the median over blocks."""
        return faster(contenders[OURS].rates, contenders[PEFT].rates)

    def metrics(self) -> dict[str, Any]:
        """Returns all of it, fit for JSON."""
        with_dropout = {name: each.results() for name, each in self.trained.items()}
        return {
            "threads": self.threads,
            "study_arguments": list(self.study_arguments),
            "greatest_loss_difference": float(self.loss_differences().max()),
            "faster": {
                "without dropout": self.faster(self.fixed),
                "with dropout": self.faster(self.trained),
            },
            "exchanges": {name: vars(found) for name, found in self.exchanges.items()},
            "without_dropout": {name: each.results() for name, each in self.fixed.items()},
            "with_dropout": with_dropout,
            "versions": versions(with_dropout.values()),
        }


def present(findings: Findings, options: argparse.Namespace, console: Console) -> None:
    """Prints and writes what was found; raises if the two don't compute the same."""
    metrics = findings.metrics()
    for table in tables(metrics):
        table.show(console)
    console.note(", ".join(f"{name} {version}" for name, version in metrics["versions"].items()))
    if options.plot:
        _save_plot(findings, options.plot)
    write_found(options, metrics)
    check_losses(findings.loss_differences().max())
    for maker, found in findings.exchanges.items():
        if found.alike < found.sentences:
            raise RuntimeError(
                f"{found.sentences - found.alike} of {found.sentences} predictions of {maker}'s "
                "adapter are others on the other side"
            )


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Returns what `Findings.metrics` found, as tables."""
    return [_training_table(found), _exchange_table(found)]


def _training_table(found: Mapping[str, Any]) -> Table:
    fixed, trained = found["without_dropout"], found["with_dropout"]
    speeds = [
        [
            f"steps/s, {name}",
            *(f"{contenders[side]['steps_per_second']:.2f}" for side in _SIDES),
            f"{found['faster'][name]:.2f}",
        ]
        for name, contenders in (("without dropout", fixed), ("with dropout", trained))
    ]
    accuracies = [trained[side]["accuracies"] for side in _SIDES]
    rows = [
        *speeds,
        _row("until ready to train (s)", trained, "seconds_to_ready", "{:.1f}", 1),
        _row("peak memory (MB)", trained, "peak_bytes", "{:,.0f}", MEGABYTE),
        [
            "accuracy, each seed",
            *(", ".join(f"{one:.4f}" for one in own) for own in accuracies),
            "",
        ],
        ["accuracy, mean", *(f"{np.mean(own):.4f}" for own in accuracies), ""],
        [
            f"difference of the first {len(fixed[OURS]['losses'][0])} losses, without dropout",
            "",
            f"{found['greatest_loss_difference']:.1e}",
            "",
        ],
    ]
    title = (
        f"LoRA on text, threads: {found['threads']}, seeds: {len(accuracies[0])}, steps of each "
        f"training: {len(trained[OURS]['losses'][0])}"
    )
    return Table(title, ["", *_SIDES, f"{OURS} / {PEFT}"], rows)


def _row(
    title: str, contenders: Mapping[str, Any], name: str, style: str, unit: float
) -> list[str]:
    ours, theirs = (contenders[side][name] / unit for side in _SIDES)
    return [title, style.format(ours), style.format(theirs), f"{ours / theirs:.2f}"]


def _exchange_table(found: Mapping[str, Any]) -> Table:
    rows = [
        [maker, f"{each['alike']:,} of {each['sentences']:,}", f"{each['difference']:.1e}"]
        for maker, each in found["exchanges"].items()
    ]
    header = ["the adapter of", "the same predictions", "log-probabilities differ by at most"]
    return Table("An adapter on the other side", header, rows)


def _save_plot(findings: Findings, path: Path) -> None:
    """Draws both loss curves on top of each other, and how far they are apart."""
    from matplotlib.figure import Figure

    from experiments.common.plots import COLOURS, save_figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ours, theirs = (findings.fixed[name].losses[0] for name in (OURS, PEFT))
    steps = np.arange(1, len(ours) + 1)
    left.plot(steps, ours, color=COLOURS[0], linewidth=4, alpha=0.5, label=OURS)
    left.plot(steps, theirs, color=COLOURS[4], linewidth=1, label=PEFT)
    left.set(xlabel="step", ylabel="cross-entropy", title="loss, dropout off")
    left.legend(frameon=False)
    right.semilogy(steps, np.maximum(findings.loss_differences(), 1e-9), ".", color=COLOURS[0])
    right.axhline(GREATEST_LOSS_DIFFERENCE, color="0.5", linestyle="--")
    right.text(1, GREATEST_LOSS_DIFFERENCE, "the most that is allowed", va="bottom", color="0.4")
    right.set(xlabel="step", title="relative difference of the losses")
    save_figure(figure, left, right, path=path)
