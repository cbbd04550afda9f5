"""What the comparison of language models found: tables, and targets that are met or missed."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measuring import write_found
from benchmarks.peers.contender import (
    GREATEST_LOSS_DIFFERENCE,
    OURS,
    PEFT,
    Contender,
    check_losses,
    faster,
    loss_differences,
    versions,
)
from benchmarks.peers.llm_contender import Writing
from experiments.common.console import Console
from experiments.common.memory import MEGABYTE
from experiments.common.tables import Table
from experiments.llm.options import parsed

# With eight bits of precision, the order of sums moves a loss by more than in float32.
_GREATEST_LOSS_DIFFERENCE = {"float32": GREATEST_LOSS_DIFFERENCE, "bfloat16": 5e-2}
LEAST_SPEED, GREATEST_MEMORY, LEAST_WRITING = 1.2, 0.8, 1.0

# Beside PEFT's fastest, and beside its leanest.
_TRAINING_HEADER = ("training", "tokens/s", "× PEFT", "MB", "× PEFT", "losses", "ready in")


@dataclass(frozen=True)
class Target:
    """A number with its target.

    Attributes:
      description: what it is.
      found: the number.
      bound: the target, in words.
      is_met: whether it is met.
    """

    description: str
    found: float
    bound: str
    is_met: bool

    @classmethod
    def at_least(cls, description: str, found: float, bound: float) -> "Target":
        """Returns a target that greater numbers meet."""
        return cls(description, found, f"≥ {bound:g}", found >= bound)

    @classmethod
    def at_most(cls, description: str, found: float, bound: float) -> "Target":
        """Returns a target that smaller numbers meet."""
        return cls(description, found, f"≤ {bound:g}", found <= bound)

    @property
    def verdict(self) -> str:
        """Whether it is met, in a word."""
        return "met" if self.is_met else "missed"


@dataclass(frozen=True)
class Findings:
    """Everything that was measured.

    Attributes:
      training: each contender after the same steps; the name of PEFT's begin with PEFT's.
      writing: both sides after writing with the same adapter; empty where neither wrote.
      threads: how many each had.
      study_arguments: what the study would be called with.
    """

    training: Mapping[str, Contender]
    writing: Mapping[str, Writing]
    threads: int
    study_arguments: Sequence[str]

    def loss_differences(self) -> dict[str, float]:
        """Returns how far each contender's losses are from ours at most, relative to ours."""
        ours = self.training[OURS]
        return {
            name: float(loss_differences(ours, theirs).max())
            for name, theirs in self.training.items()
        }

    def best(self, side: str, goodness: Callable[[Contender], float]) -> str:
        """Returns the name of a side's contender with the greatest goodness."""
        own = [name for name in self.training if name.startswith(side)]
        return max(own, key=lambda name: goodness(self.training[name]))

    def faster(self, name: str) -> float:
        """Returns how many tokens a contender trains on while PEFT's fastest does with one."""
        fastest = self.training[self.best(PEFT, _rate)]
        return faster(self.training[name].rates, fastest.rates)

    def leaner(self, name: str) -> float:
        """Returns a contender's memory over that of PEFT's leanest."""
        leanest = self.training[self.best(PEFT, _leanness)]
        return self.training[name].peak_bytes / leanest.peak_bytes

    def targets(self) -> list[Target]:
        """Returns what was to be reached, fastest beside fastest, and leanest beside leanest."""
        fast, lean = self.best(OURS, _rate), self.best(OURS, _leanness)
        return [
            Target.at_most(
                "greatest difference of losses",
                max(self.loss_differences().values()),
                self.loss_bound,
            ),
            Target.at_least(
                f"training tokens/s, {fast} / {self.best(PEFT, _rate)}",
                self.faster(fast),
                LEAST_SPEED,
            ),
            Target.at_most(
                f"training memory, {lean} / {self.best(PEFT, _leanness)}",
                self.leaner(lean),
                GREATEST_MEMORY,
            ),
            *self._writing_targets(),
        ]

    @property
    def loss_bound(self) -> float:
        """How far losses of the same computation are from each other at most."""
        return _GREATEST_LOSS_DIFFERENCE[parsed(self.study_arguments).what_learns.dtype]

    def _writing_targets(self) -> list[Target]:
        if not self.writing:
            return []
        ours, theirs = self.writing[OURS], self.writing[PEFT]
        same = ours.same_as(theirs) / ours.count
        return [
            Target.at_least("written tokens/s", faster(ours.rates, theirs.rates), LEAST_WRITING),
            Target.at_least("written tokens that are the same", same, 1),
        ]

    def metrics(self) -> dict[str, Any]:
        """Returns all of it, fit for JSON."""
        differences = self.loss_differences()
        results = {name: each.results() for name, each in self.training.items()}
        return {
            "threads": self.threads,
            "study_arguments": list(self.study_arguments),
            "targets": [{**vars(target), "verdict": target.verdict} for target in self.targets()],
            "beside": {"speed": self.best(PEFT, _rate), "memory": self.best(PEFT, _leanness)},
            "loss_differences": differences,
            "training": {
                name: {
                    "tokens_per_second": each.rate,
                    "faster": self.faster(name),
                    "leaner": self.leaner(name),
                    **results[name],
                }
                for name, each in self.training.items()
            },
            "writing": {name: each.results() for name, each in self.writing.items()},
            "versions": versions(results.values()),
        }


def present(findings: Findings, options: argparse.Namespace, console: Console) -> None:
    """Prints and writes what was found; raises if the losses are not those of one computation."""
    metrics = findings.metrics()
    for table in tables(metrics):
        table.show(console)
    beside = metrics["beside"]
    console.note(
        f"× PEFT: of {beside['speed']} for speed, {beside['memory']} for memory; losses: the "
        f"greatest relative difference from {OURS}\n"
        + ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    )
    write_found(options, metrics)
    check_losses(max(findings.loss_differences().values()), findings.loss_bound)


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Returns what `Findings.metrics` found, as tables."""
    shown = [_training_table(metrics), _writing_table(metrics), _target_table(metrics)]
    return [table for table in shown if table.rows]


def _training_table(metrics: Mapping[str, Any]) -> Table:
    rows = [
        [
            name,
            f"{each['tokens_per_second']:.0f}",
            f"{each['faster']:.2f}",
            f"{each['peak_bytes'] / MEGABYTE:,.0f}",
            f"{each['leaner']:.2f}",
            f"{metrics['loss_differences'][name]:.0e}" if name != OURS else "",
            f"{each['seconds_to_ready']:.0f} s, {each['bytes_to_ready'] / MEGABYTE:,.0f} MB",
        ]
        for name, each in metrics["training"].items()
    ]
    steps = len(metrics["training"][OURS]["losses"][0])
    title = f"LoRA on a language model, threads: {metrics['threads']}, steps: {steps}"
    return Table(title, _TRAINING_HEADER, rows)


def _writing_table(metrics: Mapping[str, Any]) -> Table:
    rows = [
        [name, f"{each['tokens_per_second']:.1f}", f"{each['peak_bytes'] / MEGABYTE:,.0f}"]
        for name, each in metrics["writing"].items()
    ]
    return Table("Writing with the adapter, merged", ["writing", "tokens/s", "MB"], rows)


def _target_table(metrics: Mapping[str, Any]) -> Table:
    rows = [
        [target["description"], f"{target['found']:.3g}", target["bound"], target["verdict"]]
        for target in metrics["targets"]
    ]
    return Table("Targets", ["", "found", "target", ""], rows)


def _rate(contender: Contender) -> float:
    return contender.rate


def _leanness(contender: Contender) -> float:
    return -contender.peak_bytes
