"""What one training on sentences came to: as metrics, as tables, as pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lora_jax
from experiments.common.claims import ALIKE, Claim, predictions_claim, weights_claim
from experiments.common.console import device_name
from experiments.common.evaluation import Evaluation
from experiments.common.resumable import Evaluated, History
from experiments.common.run import Run
from experiments.common.tables import Table, megabytes, trainable
from experiments.text.methods import Method
from experiments.text.options import Options
from experiments.text.task import TextTask


@dataclass(frozen=True)
class Findings:
    """Everything that was measured of one training.

    Attributes:
      task: what was to be learned.
      method: how it was learned.
      wrapped: the best adapter, as restored from disk.
      evaluations: those on the test sentences: with adapters on, off and merged.
      history: that of the training.
      best: the evaluation with which the adapter was chosen.
      bytes: the sizes of the adapter's folder and of the model's file.
      peak_bytes: the peak memory of the process.
      step_bytes: the memory of the step with the longest sentences.
      merge_seconds: the time to fold the adapters into the weights.
      frozen_unchanged: whether the frozen weights are bit for bit those of the model's file.
    """

    task: TextTask
    method: Method
    wrapped: Any
    evaluations: Mapping[str, Evaluation]
    history: History
    best: Evaluated | None
    bytes: Mapping[str, int]
    peak_bytes: int
    step_bytes: int
    merge_seconds: float
    frozen_unchanged: bool

    def claims(self) -> list[Claim]:
        """Returns what LoRA claims, and whether it holds here."""
        on, merged = (self.evaluations[name] for name in ("on", "merged"))
        return [
            weights_claim(self.frozen_unchanged),
            predictions_claim("merged weights predict as the adapters do", merged, on, ALIKE),
        ]

    def metrics(self, options: Options) -> dict[str, Any]:
        """Returns what metrics.json holds, besides the seconds of each phase."""
        counts = lora_jax.count_parameters(self.wrapped)
        history = self.history
        return {
            "dataset": self.task.dataset,
            "device": device_name(),
            "seed": options.seeds[0],
            "description": str(self.method),
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
                "total": counts.total,
                "trainable": counts.trainable,
                "percent": counts.percent,
            },
            "accuracy": {name: found.accuracy for name, found in self.evaluations.items()},
            "loss": {name: found.loss for name, found in self.evaluations.items()},
            "predictions_as_on": {
                name: int((found.predictions == self.evaluations["on"].predictions).sum())
                for name, found in self.evaluations.items()
            },
            "frozen_unchanged": self.frozen_unchanged,
            "best": self.best,
            "steps": len(history.of("loss")),
            "steps_per_second": history.steps_per_second,
            "bytes": dict(self.bytes),
            "peak_bytes": self.peak_bytes,
            "step_bytes": self.step_bytes,
            "merge_seconds": self.merge_seconds,
            "losses": history.of("loss"),
            "evaluations": [_as_row(evaluation) for evaluation in history.evaluations],
            "confusion": confusion(self.evaluations["on"], len(self.task.classes)).tolist(),
            "classes": list(self.task.classes),
        }


def _as_row(evaluation: Evaluated) -> list[float]:
    return [evaluation[name] for name in ("step", "accuracy", "loss")]


def confusion(evaluation: Evaluation, classes: int) -> NDArray[np.int64]:
    """Returns how often each class (rows) was taken for each class (columns)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (evaluation.labels, evaluation.predictions), 1)
    return counts


def present(findings: Findings, options: Options, run: Run) -> None:
    """Prints the tables and finishes the run."""
    metrics = findings.metrics(options)
    for table in tables(metrics):
        table.show(run.console)
    run.finish(
        metrics,
        claims=findings.claims(),
        draw=lambda folder: _save_plots(findings, folder),
    )


_DESCRIPTIONS = {
    "on": "adapters on",
    "off": "adapters off: the head on frozen features",
    "merged": "merged into the weights",
}


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Returns what `Findings.metrics` has of accuracy and costs."""
    sentences, counts = metrics["examples"]["test"], metrics["parameters"]
    accuracies = [
        [
            _DESCRIPTIONS[name],
            f"{metrics['accuracy'][name]:.4f}",
            f"{metrics['loss'][name]:.4f}",
            f"{alike:,} of {sentences:,}",
        ]
        for name, alike in metrics["predictions_as_on"].items()
    ]
    costs = {
        "trainable numbers": trainable(counts),
        "adapter, with its head": megabytes(metrics["bytes"]["adapter"]),
        "model": megabytes(metrics["bytes"]["model"]),
        "peak memory": megabytes(metrics["peak_bytes"]),
        "memory of the longest step": megabytes(metrics["step_bytes"]),
        "steps per second": f"{metrics['steps_per_second']:.2f}",
        "time to merge": f"{1000 * metrics['merge_seconds']:.1f} ms",
    }
    header = ["", "accuracy", "loss", "predictions as with adapters on"]
    return [
        Table(f"{sentences:,} test sentences: {metrics['description']}", header, accuracies),
        Table("What it costs", ["", "measured"], list(map(list, costs.items()))),
    ]


def _save_plots(findings: Findings, folder: Path) -> None:
    # Matplotlib takes half a second to import, which --no-plots saves.
    from experiments.text.plots import save_confusion, save_curves

    task, history = findings.task, findings.history
    data = f"{len(task.train):,} sentences of {task.dataset}"
    save_curves(
        folder / "curves.png",
        history.of("loss"),
        [_as_row(evaluation) for evaluation in history.evaluations],
        title=f"{findings.method}, {data}",
    )
    on = findings.evaluations["on"]
    save_confusion(
        folder / "confusion.png",
        confusion(on, len(task.classes)),
        task.classes,
        title=f"{findings.method}: accuracy {on.accuracy:.3f}\non {len(task.test):,} sentences",
    )
