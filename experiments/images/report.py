"""What the study on images came to: as metrics, as tables, as pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.claims import Claim
from experiments.common.console import Console, device_name
from experiments.common.memory import MEGABYTE
from experiments.common.run import Run
from experiments.images.drawing import DIGITS, Drawn
from experiments.images.options import BaseOptions, Options

# Pixels are between -1 and 1; two ways of adding the same numbers, over all steps of the way.
_SAME = 0.02


@dataclass(frozen=True)
class Tuned:
    """What was learned of one digit.

    Attributes:
      wrapped: the base with the adapter.
      strengths: what it draws at each strength.
      merged: what it draws merged.
      full: what the base draws that was fine-tuned in full.
      costs: for adapters and in full: trainable numbers, seconds, bytes of a step.
      bytes: the size of the adapter in each format.
    """

    wrapped: Any
    strengths: Mapping[float, Drawn]
    merged: Drawn
    full: Drawn
    costs: Mapping[str, Mapping[str, Any]]
    bytes: Mapping[str, int]


@dataclass(frozen=True)
class Findings:
    """Everything that was measured.

    Attributes:
      dataset: the name of the data.
      base_parameters: the numbers of the base.
      classifier_accuracy: how many real digits the classifier recognises.
      before: what the base draws.
      tuned: what was learned of each held-out digit.
      combined: what all adapters draw together; None if there is but one.
      served_difference: how far pictures of one batch with several adapters are from others.
    """

    dataset: str
    base_parameters: int
    classifier_accuracy: float
    before: Drawn
    tuned: Mapping[int, Tuned]
    combined: Drawn | None
    served_difference: float

    @property
    def seen(self) -> tuple[int, ...]:
        """The digits that the base has seen."""
        return tuple(digit for digit in DIGITS if digit not in self.tuned)

    def claims(self) -> list[Claim]:
        """Returns what LoRA claims, and whether it holds here."""
        claims = [
            Claim(
                "a batch with several adapters draws what each of them draws",
                self.served_difference <= _SAME,
                f"{self.served_difference:.1e} apart",
            )
        ]
        for digit, tuned in self.tuned.items():
            one = tuned.strengths.get(1.0)
            off = tuned.strengths.get(0.0)
            if one is not None:
                claims.append(
                    _same(f"merged, the adapter of {digit} draws the same", one, tuned.merged)
                )
            if off is not None:
                claims.append(_same(f"switched off, that of {digit} is gone", off, self.before))
        return claims

    def rows(self) -> list[tuple[str, Drawn, Sequence[int]]]:
        """Returns what was drawn, by its name, with the digits that it should have learned."""
        found: list[tuple[str, Drawn, Sequence[int]]] = [("the base", self.before, ())]
        for digit, tuned in self.tuned.items():
            found += [
                (f"LoRA of {digit}, strength {strength:g}", drawn, (digit,))
                for strength, drawn in tuned.strengths.items()
            ]
            found.append((f"tuned in full on {digit}", tuned.full, (digit,)))
        if self.combined is not None:
            found.append(("all adapters as one", self.combined, tuple(self.tuned)))
        return found

    def metrics(self, options: Options) -> dict[str, Any]:
        """Returns what metrics.json holds, besides the seconds of each phase."""
        return {
            "data": self.dataset,
            "device": device_name(),
            "base": options.base.as_json(),
            "tuning": options.tuning.as_json(),
            "base_parameters": self.base_parameters,
            "classifier_accuracy": self.classifier_accuracy,
            "recognised": {
                name: {str(digit): share for digit, share in drawn.recognised.items()}
                for name, drawn, _ in self.rows()
            },
            "costs": {str(digit): dict(tuned.costs) for digit, tuned in self.tuned.items()},
            "adapter_bytes": {str(digit): dict(tuned.bytes) for digit, tuned in self.tuned.items()},
            "served_difference": self.served_difference,
        }


def present(findings: Findings, options: Options, run: Run) -> None:
    """Prints the tables and finishes the run."""
    _print_tables(findings, run.console)
    run.finish(
        findings.metrics(options),
        claims=findings.claims(),
        draw=lambda folder: _save_grid(findings, folder, options),
    )


def _print_tables(findings: Findings, console: Console) -> None:
    console.rule(
        f"Recognised by a classifier that is right on {findings.classifier_accuracy:.1%} of digits"
    )
    held_out = list(findings.tuned)
    console.table(
        ["", *(f"{digit}, held out" for digit in held_out), "the others"],
        [
            [
                name,
                *(f"{drawn.recognised[digit]:.0%}" for digit in held_out),
                f"{drawn.mean_of(findings.seen):.0%}",
            ]
            for name, drawn, _ in findings.rows()
        ],
    )
    console.rule("What it costs")
    console.table(
        ["", "trainable", "seconds", "memory of a step"],
        [
            [
                f"{'LoRA' if name == 'lora' else 'in full'}, {digit}",
                f"{cost['trainable']:,} of {findings.base_parameters:,}",
                f"{cost['seconds']:.0f}",
                f"{cost['step_bytes'] / MEGABYTE:,.0f} MB",
            ]
            for digit, tuned in findings.tuned.items()
            for name, cost in tuned.costs.items()
        ],
    )
    console.table(
        ["adapter", *next(iter(findings.tuned.values())).bytes],
        [
            [str(digit), *(f"{size / MEGABYTE:.2f} MB" for size in tuned.bytes.values())]
            for digit, tuned in findings.tuned.items()
        ],
    )


def _same(text: str, one: Drawn, other: Drawn) -> Claim:
    difference = float(np.abs(one.pictures - other.pictures).max())
    # A picture on the way between two digits may tip: most of the pixels must be alike.
    alike = float(np.mean(np.abs(one.pictures - other.pictures) <= _SAME))
    return Claim(text, alike >= 0.999, f"at most {difference:.1e} apart")


def _shortness(base: BaseOptions) -> str:
    """Returns what a picture has to say of a base that has learned less than it could."""
    return " (a short training)" if base.base_steps < BaseOptions.base_steps else ""


def _save_grid(findings: Findings, folder: Path, options: Options) -> None:
    # Matplotlib takes half a second to import, which --no-plots saves.
    from experiments.images.plots import save_grid

    save_grid(
        folder / "grid.png",
        findings.rows(),
        list(findings.tuned),
        f"base: {options.base.base_steps:,} steps{_shortness(options.base)} without "
        f"{' and '.join(map(str, options.base.held_out))}; "
        f"LoRA of rank {options.tuning.rank}: {options.tuning.steps} steps on "
        f"{options.tuning.examples} pictures",
    )
