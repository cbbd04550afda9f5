"""What the MNIST study found: as metrics, as tables, as pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lora_jax
from experiments.common.claims import ALIKE, Claim, predictions_claim, weights_claim
from experiments.common.console import Console, device_name
from experiments.common.evaluation import Evaluation
from experiments.common.run import Run
from experiments.data.images import CLASSES
from experiments.mnist.options import Options

# Float32 rounds a weight of size 1 by 6e-8, and a sum of a few of them by a few times that.
_ROUNDING = 1e-5


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
                    "accuracy": evaluation.accuracy,
                    "wrong_counts": evaluation.wrong_counts(CLASSES),
                }
                for name, evaluation in self.evaluations.items()
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
    _print_tables(findings, options, run.console)
    run.finish(
        findings.metrics(options),
        claims=findings.claims(),
        draw=lambda folder: _save_plots(findings, options, folder),
    )


def _print_tables(findings: Findings, options: Options, console: Console) -> None:
    console.rule("What was added")
    console.note(lora_jax.summary(findings.wrapped))
    console.rule("Wrong answers, by digit")
    console.table(
        ["", "accuracy", *map(str, range(CLASSES))],
        [
            [name, f"{evaluation.accuracy:.4f}", *map(str, evaluation.wrong_counts(CLASSES))]
            for name, evaluation in findings.evaluations.items()
        ],
    )
    console.note(_lesson(findings, options))
    console.rule("What LoRA claims")
    console.table(
        ["claim", "holds", "measured"],
        [
            [claim.text, "yes" if claim.holds else "NO", claim.measured]
            for claim in findings.claims()
        ],
    )
    console.rule("What it costs")
    base_time = findings.milliseconds["base"]
    console.table(
        ["inference", "milliseconds per batch", "of the base's"],
        [
            [name, f"{time:.3f}", f"{time / base_time:.2f}×"]
            for name, time in findings.milliseconds.items()
        ],
    )
    console.table(
        ["checkpoint", "bytes"], [[name, f"{size:,}"] for name, size in findings.bytes.items()]
    )


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
