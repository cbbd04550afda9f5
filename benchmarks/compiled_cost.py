"""Compares what `lora_jax.adapt` compiles to with LoRA written by hand, on five models."""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from benchmarks.measuring import MeasuringParser, write_found
from benchmarks.models import MODELS, Model
from benchmarks.programs import (
    Cost,
    Program,
    base_forward,
    merged_forward,
    program_text,
    programs,
)
from experiments.common.console import Console
from experiments.common.options import positive_int
from experiments.common.tables import Table

TARGETS = {"flops": 1.00, "bytes": 1.02, "temporary_bytes": 1.05, "seconds": 1.15}
EXACT = ("flops", "bytes", "temporary_bytes")
HEADER = ("", "MFLOP", "MB accessed", "temporary MB", "trace + lower s", "compile s", "both s")


@dataclasses.dataclass(frozen=True)
class Seconds:
    """How long it takes to make a program."""

    tracing: float
    compiling: float

    @property
    def total(self) -> float:
        """Tracing, lowering and compiling."""
        return self.tracing + self.compiling


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the programs of one model cost.

    Attributes:
      model: the model.
      costs: for each program, what it costs.
      seconds: for each program, how long it takes to make it, each time that it was made.
      merged_is_base: whether inference with merged parameters is the base model's own program.
    """

    model: Model
    costs: Mapping[str, Cost]
    seconds: Mapping[str, Sequence[Seconds]]
    merged_is_base: bool

    @property
    def ratios(self) -> dict[str, float]:
        """What `adapt` costs, relative to LoRA written by hand."""
        adapted, by_hand = (dataclasses.asdict(self.costs[name]) for name in ("adapt", "by hand"))
        exact = {name: adapted[name] / by_hand[name] for name in adapted}
        pairs = zip(self.seconds["adapt"], self.seconds["by hand"], strict=True)
        return {**exact, "seconds": statistics.median(a.total / b.total for a, b in pairs)}

    def as_json(self) -> dict[str, Any]:
        """Returns all of it as JSON has it."""
        return {
            "model": self.model.name,
            "description": self.model.description,
            "costs": {name: dataclasses.asdict(cost) for name, cost in self.costs.items()},
            "seconds": {
                name: [dataclasses.asdict(one) for one in all_of_them]
                for name, all_of_them in self.seconds.items()
            },
            "ratios": self.ratios,
            "merged_is_base": self.merged_is_base,
        }


def is_met(name: str, ratio: float) -> bool:
    """Says whether a ratio is within its target."""
    return ratio <= TARGETS[name]


def compared(model: Model, repeats: int) -> Comparison:
    """Returns what the programs of `model` cost, each made `repeats` times.

    They take turns, so that a machine that slows down favours none. Before each, all that JAX
    keeps is dropped, and a first round is not counted: it pays for imports and the like.
    """
    makers = programs(model)
    costs = {name: cost_and_seconds(make)[0] for name, make in makers.items()}
    seconds: dict[str, list[Seconds]] = {name: [] for name in makers}
    for _ in range(repeats):
        for name, make in makers.items():
            seconds[name].append(cost_and_seconds(make)[1])
    texts = [
        program_text(make(model).lowered().compile()) for make in (base_forward, merged_forward)
    ]
    return Comparison(model, costs, seconds, texts[0] == texts[1])


def cost_and_seconds(make: Callable[[], Program]) -> tuple[Cost, Seconds]:
    """Returns what a program costs, and how long it takes to trace, lower and compile it."""
    jax.clear_caches()
    program = make()
    start = time.perf_counter()
    lowered = program.lowered()
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return Cost.of(compiled), Seconds(traced - start, end - traced)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table for each model; returns 0 unless a target that is exact is missed."""
    options, console = _parsed(argv), Console()
    comparisons = []
    for name in options.model or MODELS:
        comparisons.append(compared(MODELS[name], options.repeats))
        _table(comparisons[-1].as_json()).show(console)
    write_found(options, {"models": [one.as_json() for one in comparisons]})
    return int(any(_misses_an_exact_target(one) for one in comparisons))


def _misses_an_exact_target(comparison: Comparison) -> bool:
    ratios = comparison.ratios
    return not all(is_met(name, ratios[name]) for name in EXACT) or not comparison.merged_is_base


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Returns what `--json` writes, as a table for each model."""
    return list(map(_table, found["models"]))


def _table(found: Mapping[str, Any]) -> Table:
    costs, seconds, ratios = found["costs"], found["seconds"], found["ratios"]
    same = "the base model's own program" if found["merged_is_base"] else "another than the base's"
    rows = [[name, *_cells(costs[name], seconds[name])] for name in costs]
    for name, of in (
        ("adapt / by hand", lambda cost: f"{ratios[cost]:.{6 if cost in EXACT else 2}f}"),
        ("target", lambda cost: f"{TARGETS[cost]:.2f}"),
        ("", lambda cost: "met" if is_met(cost, ratios[cost]) else "missed"),
    ):
        rows.append([name, *map(of, EXACT), "", "", of("seconds")])
    title = f"{found['model']}: {found['description']}; inference after merge: {same}"
    return Table(title, HEADER, rows)


def _cells(cost: Mapping[str, float], seconds: Sequence[Mapping[str, float]]) -> list[str]:
    exact = [f"{cost[name] / 1e6:,.3f}" for name in EXACT]
    tracing, compiling = ([one[name] for one in seconds] for name in ("tracing", "compiling"))
    totals = [sum(pair) for pair in zip(tracing, compiling, strict=True)]
    return [*exact, *(f"{statistics.median(each):.2f}" for each in (tracing, compiling, totals))]


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = MeasuringParser("compiled_cost", __doc__)
    parser.add_argument(
        "--model", action="append", choices=list(MODELS), help="only this one (may be repeated)"
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=5,
        metavar="N",
        help="how often to trace and compile each program",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
