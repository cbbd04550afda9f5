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
            "with_dropout": {name: each.results() for name, each in self.trained.items()},
        }


def present(findings: Findings, options: argparse.Namespace, console: Console) -> None:
    """Prints and writes what was found; raises if the two don't compute the same."""
    _print(findings, console)
    if options.plot:
        _save_plot(findings, options.plot)
    write_found(options, findings.metrics())
    check_losses(findings.loss_differences().max())
    for maker, found in findings.exchanges.items():
        if found.alike < found.sentences:
            raise RuntimeError(
                f"{found.sentences - found.alike} of {found.sentences} predictions of {maker}'s "
                "adapter are others on the other side"
            )


def _print(findings: Findings, console: Console) -> None:
    trained, fixed = findings.trained, findings.fixed
    seeds = len(trained[OURS].accuracies)
    console.rule(
        f"LoRA on text, threads: {findings.threads}, seeds: {seeds}, steps of each training: "
        f"{len(trained[OURS].losses[0])}"
    )
    console.table(
        ["", OURS, PEFT, f"{OURS} / {PEFT}"],
        [
            _row(
                "steps/s, dropout off", fixed, lambda it: it.rate, "{:.2f}", findings.faster(fixed)
            ),
            _row(
                "steps/s, dropout on",
                trained,
                lambda it: it.rate,
                "{:.2f}",
                findings.faster(trained),
            ),
            _row("until ready to train (s)", trained, lambda it: it.seconds_to_ready, "{:.1f}"),
            _row("peak memory (MB)", trained, lambda it: it.peak_bytes / 1e6, "{:,.0f}"),
            ["accuracy, each seed", *(_listed(trained[name]) for name in (OURS, PEFT)), ""],
            ["accuracy, mean", *(f"{_accuracy(trained[name]):.4f}" for name in (OURS, PEFT)), ""],
        ],
    )
    steps, difference = len(fixed[OURS].losses[0]), findings.loss_differences().max()
    console.note(f"The first {steps} losses without dropout differ by at most {difference:.1e}")
    for maker, found in findings.exchanges.items():
        console.note(
            f"The adapter of {maker} on the other side: {found.alike:,} of {found.sentences:,} "
            f"predictions are the same, log-probabilities differ by at most {found.difference:.1e}"
        )
    console.note(versions(trained))


def _row(
    title: str,
    contenders: Mapping[str, TextContender],
    value: Any,
    style: str,
    ratio: float | None = None,
) -> list[str]:
    ours, theirs = (value(contenders[name]) for name in (OURS, PEFT))
    ratio = ours / theirs if ratio is None else ratio
    return [title, style.format(ours), style.format(theirs), f"{ratio:.2f}"]


def _accuracy(contender: TextContender) -> float:
    return float(np.mean(contender.accuracies))


def _listed(contender: TextContender) -> str:
    return ", ".join(f"{accuracy:.4f}" for accuracy in contender.accuracies)


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
