"""What one training on sentences came to: as metrics, as tables, as pictures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lora_jax
from experiments.console import Console, device_name
from experiments.evaluation import Evaluation
from experiments.output import write_json
from experiments.text.methods import Method
from experiments.text.options import Options
from experiments.text.task import TextTask
from experiments.text.training import History
from experiments.timing import Stopwatch

_MEGABYTE = 1e6
# Two ways of adding the same numbers may tip a sentence that lies between two classes.
_ALIKE = 0.999


@dataclass(frozen=True)
class Findings:
    """Everything that one training was measured by.

    Attributes:
      task: what was to be learned.
      method: how it was.
      wrapped: the best adapter, as it came back from disk.
      evaluations: on the test sentences: with adapters on, off and merged.
      history: that of the training.
      bytes: the sizes of the adapter's folder and of the model's file.
      peak_bytes: the most memory that the process used.
      step_bytes: what the longest step has in memory.
      merge_seconds: what folding the adapters into the weights takes.
      frozen_unchanged: whether the frozen weights are bit for bit those of the model's file.
    """

    task: TextTask
    method: Method
    wrapped: Any
    evaluations: Mapping[str, Evaluation]
    history: History
    bytes: Mapping[str, int]
    peak_bytes: int
    step_bytes: int
    merge_seconds: float
    frozen_unchanged: bool

    @property
    def merged_alike(self) -> float:
        on, merged = (self.evaluations[name].predictions for name in ("on", "merged"))
        return float(np.mean(on == merged))

    def metrics(self, options: Options, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Returns what metrics.json holds."""
        counts = lora_jax.count_parameters(self.wrapped)
        history, best = self.history, self.history.best
        return {
            "dataset": self.task.dataset,
            "device": device_name(),
            "seed": options.seeds[0],
            "method": self.method.name,
            "rank": self.method.rank,
            "training": options.training.as_json(),
            "examples": {
                "train": len(self.task.train),
                "validation": len(self.task.validation),
                "test": len(self.task.test),
            },
            "parameters": {
                "original": counts.original,
                "trainable": counts.trainable,
                "percent": counts.percent,
            },
            "accuracy": {name: found.accuracy for name, found in self.evaluations.items()},
            "merged_predictions_alike": self.merged_alike,
            "frozen_unchanged": self.frozen_unchanged,
            "best": None
            if best is None
            else {"step": best[0], "accuracy": best[1], "loss": best[2]},
            "steps": len(history.losses),
            "steps_per_second": history.steps_per_second,
            "bytes": dict(self.bytes),
            "peak_bytes": self.peak_bytes,
            "step_bytes": self.step_bytes,
            "merge_seconds": self.merge_seconds,
            "losses": history.losses,
            "evaluations": [list(evaluation) for evaluation in history.evaluations],
            "confusion": confusion(self.evaluations["on"], len(self.task.classes)).tolist(),
            "classes": list(self.task.classes),
            "seconds": dict(seconds),
        }


def confusion(evaluation: Evaluation, classes: int) -> NDArray[np.int64]:
    """Returns how often each class, by rows, was taken for each, by columns."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (evaluation.labels, evaluation.predictions), 1)
    return counts


def present(findings: Findings, options: Options, watch: Stopwatch, console: Console) -> None:
    """Prints the tables, writes the files, and raises if a claim did not hold."""
    _print_tables(findings, console)
    if not options.no_plots:
        _save_plots(findings, options.out)
        watch.phase_ended("plots")
    metrics = findings.metrics(options, watch.seconds())
    write_json(options.out / "metrics.json", metrics)
    console.note(f"Results are in {options.out} ({watch.seconds()['total']:.0f} seconds)")
    if options.json:
        print(json.dumps(metrics, indent=2))
    if not findings.frozen_unchanged:
        raise RuntimeError("the frozen weights changed")
    if findings.merged_alike < _ALIKE:
        raise RuntimeError(
            f"merged weights predict otherwise: {findings.merged_alike:.2%} are alike"
        )


def _print_tables(findings: Findings, console: Console) -> None:
    console.rule(f"{len(findings.task.test):,} test sentences: {findings.method}")
    on = findings.evaluations["on"].predictions
    console.table(
        ["", "accuracy", "loss", "predictions as with adapters on"],
        [
            [
                _DESCRIPTIONS[name],
                f"{found.accuracy:.4f}",
                f"{found.loss:.4f}",
                f"{(found.predictions == on).sum():,} of {len(on):,}",
            ]
            for name, found in findings.evaluations.items()
        ],
    )
    console.rule("What it costs")
    counts = lora_jax.count_parameters(findings.wrapped)
    sizes = findings.bytes
    rows = {
        "trainable numbers": f"{counts.trainable:,} of {counts.total:,} ({counts.percent:.3f} %)",
        "adapter, with its head": _megabytes(sizes["adapter"]),
        "model": _megabytes(sizes["model"]),
        "peak memory": _megabytes(findings.peak_bytes),
        "memory of the longest step": _megabytes(findings.step_bytes),
        "steps per second": f"{findings.history.steps_per_second:.2f}",
        "time to merge": f"{1000 * findings.merge_seconds:.1f} ms",
    }
    console.table(["", "measured"], [list(row) for row in rows.items()])


_DESCRIPTIONS = {
    "on": "adapters on",
    "off": "adapters off: the head on frozen features",
    "merged": "merged into the weights",
}


def _megabytes(size: int) -> str:
    return f"{size / _MEGABYTE:,.2f} MB"


def _save_plots(findings: Findings, out: Path) -> None:
    # Matplotlib takes half a second to import, which --no-plots spares.
    from experiments.text.plots import save_confusion, save_curves

    task, history = findings.task, findings.history
    data = f"{len(task.train):,} sentences of {task.dataset}"
    save_curves(
        out / "curves.png",
        history.losses,
        history.evaluations,
        title=f"{findings.method}, {data}",
    )
    on = findings.evaluations["on"]
    save_confusion(
        out / "confusion.png",
        confusion(on, len(task.classes)),
        task.classes,
        title=f"{findings.method}: accuracy {on.accuracy:.3f}\non {len(task.test):,} sentences",
    )
