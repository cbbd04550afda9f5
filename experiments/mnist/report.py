"""What the MNIST study found: as metrics, as tables, as pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lora_jax
from experiments.common.claims import ALIKE, Claim, predictions_claim, weights_claim
from experiments.common.console import device_name
from experiments.common.evaluation import Evaluation
from experiments.common.run import Run
from experiments.common.tables import Table
from experiments.data.images import CLASSES
from experiments.mnist.options import Options

# Float32 rounds a weight of size 1 by 6e-8, and a sum of a few of them by a few times that.
_ROUNDING = 1e-5
# The networks whose answers are counted.
TESTED = ("base", "adapted", "disabled", "merged", "restored")


@dataclass(frozen=True)
class Findings:
    """Everything that the study measured."""

    dataset: str
    digit: int
    wrapped: Any
    evaluations: Mapping[str, Evaluation]
    frozen_unchanged: bool
    max_weight_error: float
    bytes: Mapping[str, int]
    milliseconds: Mapping[str, float]
    losses: Mapping[str, NDArray[np.float32]]

    def metrics(self, options: Options) -> dict[str, Any]:
        """Returns what metrics.json holds, besides the seconds of each phase."""
        counts = lora_jax.count_parameters(self.wrapped)
        rank, alpha = options.adapters.rank, options.adapters.alpha
        return {
            "dataset": self.dataset,
            "device": device_name(),
            "seed": options.training.seed,
            "rank": rank,
            "alpha": float(rank) if alpha is None else alpha,
            "digit": self.digit,
            "parameters": {
                "original": counts.original,
                "added": counts.added,
                "total": counts.total,
                "percent": counts.percent,
            },
            **{
                name: {
                    "accuracy": self.evaluations[name].accuracy,
                    "wrong_counts": self.evaluations[name].wrong_counts(CLASSES),
                }
                for name in TESTED
            },
            "frozen_unchanged": self.frozen_unchanged,
            "max_weight_error": self.max_weight_error,
            "bytes": dict(self.bytes),
            "milliseconds": dict(self.milliseconds),
        }

    def claims(self) -> list[Claim]:
        """Returns what LoRA claims, and whether it holds here."""
        base, adapted, merged = (self.evaluations[name] for name in ("base", "adapted", "merged"))
        disabled, restored = self.evaluations["disabled"], self.evaluations["restored"]
        return [
            weights_claim(self.frozen_unchanged),
            predictions_claim("with the adapters off, the base is back", disabled, base, 1.0),
            Claim(
                "merged weight = W + scale·A·B",
                self.max_weight_error < _ROUNDING,
                f"off by {self.max_weight_error:.1e} at most",
            ),
            predictions_claim("merged weights predict as the adapters do", merged, adapted, ALIKE),
            predictions_claim(
                "the adapters' checkpoint brings it all back", restored, adapted, 1.0
            ),
        ]


def present(findings: Findings, options: Options, run: Run) -> None:
    """Prints the tables and finishes the run."""
    metrics = findings.metrics(options)
    wrong_answers, *costs = tables(metrics)
    run.console.rule("What was added")
    run.console.note(lora_jax.summary(findings.wrapped))
    wrong_answers.show(run.console)
    run.console.note(_lesson(findings, options))
    for table in (_claims(findings.claims()), *costs):
        table.show(run.console)
    run.finish(
        metrics,
        claims=findings.claims(),
        draw=lambda folder: _save_plots(findings, options, folder),
    )


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Returns what `Findings.metrics` has of answers, of inference and of checkpoints."""
    wrong_answers = [
        [name, f"{metrics[name]['accuracy']:.4f}", *map(str, metrics[name]["wrong_counts"])]
        for name in TESTED
    ]
    milliseconds = metrics["milliseconds"]
    inference = [
        [name, f"{each:.3f}", f"{each / milliseconds['base']:.2f}×"]
        for name, each in milliseconds.items()
    ]
    checkpoints = [[name, f"{size:,}"] for name, size in metrics["bytes"].items()]
    digits = map(str, range(len(metrics["base"]["wrong_counts"])))
    return [
        Table("Wrong answers, by digit", ["", "accuracy", *digits], wrong_answers),
        Table("Inference", ["", "milliseconds per batch", "of the base's"], inference),
        Table("Checkpoints", ["", "bytes"], checkpoints),
    ]


def _claims(claims: Sequence[Claim]) -> Table:
    rows = [[claim.text, "yes" if claim.holds else "NO", claim.measured] for claim in claims]
    return Table("What LoRA claims", ["claim", "holds", "measured"], rows)


def _lesson(findings: Findings, options: Options) -> str:
    """Returns what the table of wrong answers shows."""
    digit = findings.digit
    base, adapted = (findings.evaluations[name] for name in ("base", "adapted"))
    before, after = (evaluation.wrong_counts(CLASSES)[digit] for evaluation in (base, adapted))
    change = f"Digit {digit}: {before} wrong before fine-tuning, {after} after."
    if options.training.replay > 0 or adapted.accuracy >= base.accuracy:
        return change
    return (
        f"{change} The other digits suffered, since none of them was shown: "
        "--replay 0.5 mixes them in."
    )


def _save_plots(findings: Findings, options: Options, folder: Path) -> None:
    # Matplotlib takes half a second to import, which --no-plots saves.
    from experiments.common.plots import save_losses
    from experiments.mnist.plots import save_wrong_counts

    digit, data, replay = findings.digit, findings.dataset, options.training.replay
    recipe = f"rank {options.adapters.rank}, fine-tuned on digit {digit}" + (
        f" with {replay:.0%} of others" if replay else ""
    )
    before, after = (findings.evaluations[name] for name in ("base", "adapted"))
    save_wrong_counts(
        folder / "wrong_counts.png",
        {
            f"base, accuracy {before.accuracy:.3f}": before.wrong_counts(CLASSES),
            f"adapted, accuracy {after.accuracy:.3f}": after.wrong_counts(CLASSES),
        },
        tuned_digit=digit,
        title=f"Wrong answers on {data} test images ({recipe})",
    )
    save_losses(folder / "loss.png", findings.losses, title=f"Training on {data} ({recipe})")
