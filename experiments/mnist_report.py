"""What the MNIST study found: as metrics, as tables, as pictures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lora_jax
from experiments.console import Console, device_name
from experiments.data.dataset import CLASSES
from experiments.evaluation import Evaluation
from experiments.mnist_options import Options
from experiments.output import write_json
from experiments.timing import Stopwatch

# Float32 rounds a weight of size 1 by 6e-8, and a sum of a few of them by a few times that.
_ROUNDING = 1e-5
# Two ways of adding the same numbers may tip an image that lies between two digits.
_ALIKE = 0.999


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

    def metrics(self, options: Options, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Returns what metrics.json holds."""
        counts = lora_jax.count_parameters(self.wrapped)
        return {
            "dataset": self.dataset,
            "device": device_name(),
            "seed": options.seed,
            "rank": options.rank,
            "alpha": options.alpha,
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
            "seconds": dict(seconds),
            "milliseconds": dict(self.milliseconds),
        }

    def claims(self) -> dict[str, tuple[bool, str]]:
        """Returns, for each claim of LoRA, whether it held and what was measured."""
        base, adapted, merged = (self.evaluations[name] for name in ("base", "adapted", "merged"))
        disabled, restored = self.evaluations["disabled"], self.evaluations["restored"]
        return {
            "the frozen weights are bit for bit what they were": (self.frozen_unchanged, ""),
            "with the adapters off, the base is back": _alike(disabled, base, 1.0),
            "merged weight = W + scale·A·B": (
                self.max_weight_error < _ROUNDING,
                f"off by {self.max_weight_error:.1e} at most",
            ),
            "merged weights predict as the adapters do": _alike(merged, adapted, _ALIKE),
            "the adapters' checkpoint brings it all back": _alike(restored, adapted, 1.0),
        }


def _alike(one: Evaluation, other: Evaluation, enough: float) -> tuple[bool, str]:
    same = one.predictions == other.predictions
    return float(np.mean(same)) >= enough, f"{same.sum():,} of {same.size:,} predictions alike"


def present(findings: Findings, options: Options, watch: Stopwatch, console: Console) -> None:
    """Prints the tables, writes the files, and raises if a claim did not hold."""
    _print_tables(findings, options, console)
    if not options.no_plots:
        _save_plots(findings, options)
        watch.phase_ended("plots")
    metrics = findings.metrics(options, watch.seconds())
    write_json(options.out / "metrics.json", metrics)
    console.note(f"Results are in {options.out} ({watch.seconds()['total']:.0f} seconds)")
    if options.json:
        print(json.dumps(metrics, indent=2))
    broken = [claim for claim, (holds, _) in findings.claims().items() if not holds]
    if broken:
        raise RuntimeError(f"not as claimed: {'; '.join(broken)}")


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
            [claim, "yes" if holds else "NO", measured]
            for claim, (holds, measured) in findings.claims().items()
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
    if options.replay > 0 or adapted.accuracy >= base.accuracy:
        return change
    return (
        f"{change} The other digits suffered, since none of them was shown: "
        "--replay 0.5 mixes them in."
    )


def _save_plots(findings: Findings, options: Options) -> None:
    # Matplotlib takes half a second to import, which --no-plots spares.
    from experiments.plots import save_losses, save_wrong_counts

    digit, data = findings.digit, findings.dataset
    recipe = f"rank {options.rank}, fine-tuned on digit {digit}" + (
        f" with {options.replay:.0%} of others" if options.replay else ""
    )
    before, after = (findings.evaluations[name] for name in ("base", "adapted"))
    save_wrong_counts(
        options.out / "wrong_counts.png",
        {
            f"base, accuracy {before.accuracy:.3f}": before.wrong_counts(CLASSES),
            f"adapted, accuracy {after.accuracy:.3f}": after.wrong_counts(CLASSES),
        },
        tuned_digit=digit,
        title=f"Wrong answers on {data} test images ({recipe})",
    )
    save_losses(options.out / "loss.png", findings.losses, title=f"Training on {data} ({recipe})")
