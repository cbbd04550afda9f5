"""What the study on images came to: as metrics, as tables, as pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.claims import Claim
from experiments.common.console import device_name
from experiments.common.run import Run
from experiments.common.tables import Table, megabytes
from experiments.images.drawing import Drawn
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
    metrics = findings.metrics(options)
    for table in tables(metrics):
        table.show(run.console)
    run.finish(
        metrics,
        claims=findings.claims(),
        draw=lambda folder: _save_grid(findings, folder, options),
    )


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Returns what `Findings.metrics` has of what was drawn, and of costs."""
    sizes = metrics["adapter_bytes"]
    adapters = [[digit, *map(megabytes, own.values())] for digit, own in sizes.items()]
    return [
        _recognised(metrics),
        _costs(metrics),
        Table("Adapters", ["", *next(iter(sizes.values()))], adapters),
    ]


def _recognised(metrics: Mapping[str, Any]) -> Table:
    held_out = list(metrics["costs"])
    rows = []
    for name, shares in metrics["recognised"].items():
        others = [share for digit, share in shares.items() if digit not in held_out]
        own = [f"{shares[digit]:.0%}" for digit in held_out]
        rows.append([name, *own, f"{np.mean(others):.0%}"])
    accuracy = f"{metrics['classifier_accuracy']:.1%}"
    title = f"Recognised by a classifier that is right on {accuracy} of digits"
    return Table(title, ["", *(f"{digit}, held out" for digit in held_out), "the others"], rows)


def _costs(metrics: Mapping[str, Any]) -> Table:
    rows = [
        [
            f"{digit}, {'LoRA' if name == 'lora' else 'in full'}",
            f"{cost['trainable']:,} of {metrics['base_parameters']:,}",
            f"{cost['seconds']:.0f}",
            megabytes(cost["step_bytes"]),
        ]
        for digit, costs in metrics["costs"].items()
        for name, cost in costs.items()
    ]
    header = ["", "trainable", "seconds", "memory of a step"]
    return Table("What learning a digit costs", header, rows)


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
