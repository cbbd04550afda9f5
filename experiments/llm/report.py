"""What one training of a language model came to: as metrics, as tables, as a picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_jax
from experiments.common.claims import Claim, weights_claim
from experiments.common.console import device_name
from experiments.common.resumable import Evaluated, History
from experiments.common.run import Run
from experiments.common.tables import Table, megabytes, trainable
from experiments.llm.options import Options
from experiments.llm.task import LanguageTask

# Merged weights are rounded once: in bfloat16 a small change loses digits.
_MERGED_LOSS = {"float32": 1e-3, "bfloat16": 0.05}


@dataclass(frozen=True)
class Findings:
    """Everything that was measured of one training.

    Attributes:
      task: what was to be learned.
      wrapped: the best adapter, as restored from disk.
      evaluations: the objective on held-out examples: adapters off, on and merged.
      history: that of the training.
      best: the evaluation with which the adapter was chosen.
      fullness: the part of the rows that is tokens of examples.
      adapter_bytes: the size of the adapter's folder.
      peak_bytes: the peak memory of the process.
      step_bytes: the memory of the step.
      frozen_unchanged: whether the frozen weights are bit for bit those that were read.
    """

    task: LanguageTask
    wrapped: Any
    evaluations: Mapping[str, Evaluated]
    history: History
    best: Evaluated | None
    fullness: float
    adapter_bytes: int
    peak_bytes: int
    step_bytes: int
    frozen_unchanged: bool

    @property
    def tokens_per_second(self) -> float:
        """All tokens of examples that steps were taken on, learned or not."""
        return sum(self.history.of("seen")) / sum(self.history.of("seconds"))

    def claims(self, dtype: str) -> list[Claim]:
        """Returns what LoRA claims, and whether it holds here."""
        on, merged = (self.evaluations[name]["loss"] for name in ("on", "merged"))
        return [
            weights_claim(self.frozen_unchanged),
            Claim(
                "merged weights have the loss that the adapters have",
                abs(on - merged) <= _MERGED_LOSS[dtype],
                f"{on:.4f} and {merged:.4f}",
            ),
        ]

    def metrics(self, options: Options) -> dict[str, Any]:
        """Returns what metrics.json holds, besides the seconds of each phase."""
        counts = lora_jax.count_parameters(self.wrapped)
        history = self.history
        return {
            "data": self.task.name,
            "model": str(self.task.model.path),
            "device": device_name(),
            "description": options.training.description,
            "method": options.training.method,
            "rank": options.training.chosen_method.rank,
            "soft_prompt": options.training.soft_prompt,
            "quantize": options.what_learns.quantize,
            "dtype": options.what_learns.dtype,
            "mesh": options.what_learns.mesh,
            "training": options.training.as_json(),
            "examples": {
                "train": len(self.task.train.examples),
                "validation": len(self.task.validation.examples),
                "cut": self.task.train.cut + self.task.validation.cut,
                "dropped": self.task.train.dropped + self.task.validation.dropped,
            },
            "fullness": self.fullness,
            "parameters": {
                "original": counts.original,
                "total": counts.total,
                "trainable": counts.trainable,
                "percent": counts.percent,
            },
            "held_out": {name: dict(found) for name, found in self.evaluations.items()},
            "best": self.best,
            "frozen_unchanged": self.frozen_unchanged,
            "steps": len(history.of("loss")),
            "steps_per_second": history.steps_per_second,
            "tokens_per_second": self.tokens_per_second,
            "adapter_bytes": self.adapter_bytes,
            "peak_bytes": self.peak_bytes,
            "step_bytes": self.step_bytes,
            "losses": history.of("loss"),
            "evaluations": history.evaluations,
        }


def present(findings: Findings, options: Options, run: Run) -> None:
    """Prints the tables and finishes the run."""
    metrics = findings.metrics(options)
    for table in tables(metrics):
        table.show(run.console)
    run.finish(
        metrics,
        claims=findings.claims(options.what_learns.dtype),
        draw=lambda folder: _save_plot(findings, folder, options),
    )


_DESCRIPTIONS = {
    "off": "adapters off: the model as it was",
    "on": "adapters on",
    "merged": "merged into the weights",
}


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Returns what `Findings.metrics` has of held-out examples and costs."""
    held_out = metrics["held_out"]
    rows = [
        [_DESCRIPTIONS[name], *(f"{value:.4f}" for value in found.values())]
        for name, found in held_out.items()
    ]
    costs = {
        "trainable numbers": trainable(metrics["parameters"]),
        "adapter": megabytes(metrics["adapter_bytes"]),
        "memory of a step": megabytes(metrics["step_bytes"]),
        "peak memory": megabytes(metrics["peak_bytes"]),
        "tokens a second": f"{metrics['tokens_per_second']:,.0f}",
    }
    title = f"{metrics['examples']['validation']:,} held-out examples: {metrics['description']}"
    return [
        Table(title, ["", *held_out["on"]], rows),
        Table("What it costs", ["", "measured"], list(map(list, costs.items()))),
    ]


def _save_plot(findings: Findings, folder: Path, options: Options) -> None:
    # Matplotlib takes half a second to import, which --no-plots saves.
    from experiments.llm.plots import save_curve

    save_curve(
        folder / "curve.png",
        findings.history,
        findings.evaluations["off"]["loss"],
        title=f"{options.training.description}: {len(findings.task.train.examples):,} examples "
        f"of {findings.task.name}",
    )
