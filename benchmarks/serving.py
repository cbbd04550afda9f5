"""Many adapters in one batch, in turns: the base model, `serving.adapt`, merging, and a loop.

Each round makes one call of each kind, and starts with another kind than the round before. The loop
is what is done without `serving.adapt`: the examples of each adapter by themselves, one compiled
call for each adapter.
"""

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks.measuring import MeasuringParser, write_found
from benchmarks.models import MLP, SCANNED_TRANSFORMER, Model
from benchmarks.programs import Cost, base_function
from experiments.common.console import Console
from experiments.common.options import positive_int
from experiments.common.tables import Table
from experiments.common.timing import in_turns

BATCH = 64
RANK = 8
COUNTS = (1, 8, 64)
TOKENS = 16
HEADER = (f"batch of {BATCH}", "MFLOP", "of the base's", "ms", "of the base's")

Call = Callable[[], Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, and returns the exit code."""
    options = _parser().parse_args(argv)
    console = Console()
    results = {}
    for name in options.model or list(MODELS):
        results[name] = Comparison(*MODELS[name][:2]).measured(options.rounds)
        _table(name, results[name]).show(console)
    write_found(options, {"models": results})
    return 0


MODELS: Mapping[str, tuple[Model, tuple[int, ...], str]] = {
    "mlp": (MLP, (784,), "784-1000-2000-10"),
    "scanned-transformer": (
        SCANNED_TRANSFORMER,
        (TOKENS, 512),
        f"6 blocks in a scan, embed 512, 8 heads, {TOKENS} tokens an example",
    ),
}


class Comparison:
    """One model with stacks of adapters, and the calls that are compared on it."""

    def __init__(self, model: Model, example_shape: tuple[int, ...]) -> None:
        self._model = model
        self._fn = base_function(self._model)
        random = np.random.default_rng(0)
        self._params = jax.tree.map(
            lambda leaf: jnp.asarray(random.normal(size=leaf.shape) / 30, leaf.dtype),
            self._model.params,
        )
        self._x = jnp.asarray(random.normal(size=(BATCH, *example_shape)), jnp.float32)
        axes = lora_jax.infer_axes(self._fn, self._params, self._x)
        self._wrapped = lora_jax.wrap(self._params, self._model.targets, rank=RANK, axes=axes)
        self._adapted = jax.jit(lora_jax.adapt(self._fn, on_materialize="error"))
        self._batched = jax.jit(lora_jax.serving.adapt(self._fn, on_materialize="error"))
        self._base = jax.jit(self._fn)

    def measured(self, rounds: int) -> dict[str, Any]:
        """Returns the operations and the milliseconds of each call."""
        calls: dict[str, Call] = {
            "base model": functools.partial(self._base, self._params, self._x)
        }
        flops = {"base model": _flops(self._base, self._params, self._x)}
        for count in COUNTS:
            ids = jnp.arange(BATCH, dtype=jnp.int32) % count
            bank = lora_jax.serving.bank(self._adapters(count))
            batched, loop = (f"{how}, different adapters: {count}" for how in ("batched", "loop"))
            calls[batched] = functools.partial(self._batched, bank, ids, self._x)
            flops[batched] = _flops(self._batched, bank, ids, self._x)
            calls[loop] = self._loop(bank, ids, count)
            np.testing.assert_allclose(calls[batched](), calls[loop](), rtol=1e-3, atol=1e-3)
        return {"milliseconds": _milliseconds(calls, rounds), "mflop": flops}

    def _adapters(self, count: int) -> list[Any]:
        """Returns adapters with numbers that differ, as if each had been trained."""

        def trained(label: str, leaf: Any, random: np.random.Generator) -> Any:
            if label != "lora_B":
                return leaf
            return jnp.asarray(random.normal(size=leaf.shape) / 30, leaf.dtype)

        return [
            jax.tree.map(
                functools.partial(trained, random=np.random.default_rng(seed)),
                lora_jax.labels(self._wrapped),
                self._wrapped,
            )
            for seed in range(count)
        ]

    def _loop(self, bank: Any, ids: jax.Array, count: int) -> Call:
        """Returns one call for each adapter, with the examples that ask for it."""
        singles = [lora_jax.serving.select(bank, place) for place in range(count)]
        places = [np.flatnonzero(np.asarray(ids) == place) for place in range(count)]
        back = np.argsort(np.concatenate(places))
        examples = [self._x[each] for each in places]

        in_order = jax.jit(lambda parts: jnp.concatenate(parts)[back])

        def looped() -> Any:
            pairs = zip(singles, examples, strict=True)
            return in_order([self._adapted(*pair) for pair in pairs])

        return looped


def _flops(fn: Any, *arguments: Any) -> float:
    return Cost.of(fn.lower(*arguments).compile()).flops / 1e6


def _milliseconds(calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Returns each call's median time; the first two rounds are for compiling."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for order in in_turns(list(calls), rounds + 2):
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(each[2:])) for name, each in times.items()}


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Returns what `--json` writes, as a table for each model."""
    return [_table(name, results) for name, results in found["models"].items()]


def _table(name: str, results: Mapping[str, Mapping[str, float]]) -> Table:
    milliseconds, mflop = results["milliseconds"], results["mflop"]
    rows = [
        [
            call,
            f"{mflop[call]:,.1f}" if call in mflop else "",
            f"{mflop[call] / mflop['base model']:.3f}" if call in mflop else "",
            f"{milliseconds[call]:.2f}",
            f"{milliseconds[call] / milliseconds['base model']:.2f}",
        ]
        for call in milliseconds
    ]
    return Table(f"{name}: {MODELS[name][2]}, rank {RANK}", HEADER, rows)


def _parser() -> MeasuringParser:
    parser = MeasuringParser("serving", __doc__)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="one model only")
    parser.add_argument("--rounds", type=positive_int, default=30, help="calls of each kind")
    return parser


if __name__ == "__main__":
    sys.exit(main())
