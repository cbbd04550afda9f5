"""The training step of the MNIST study, in turns: all weights, LoRA by hand, and `lora_jax`.

The steps reuse the memory of the tree that they are given, but for the last, which copies it.
Each round runs a block of steps of each kind, and starts with another kind than the round before.
Beside the time of a step stand what the host spends on it: gathering the batch and dispatching.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

import lora_jax
from benchmarks.measuring import MeasuringParser, write_found
from experiments.common.console import Console
from experiments.common.options import positive_int
from experiments.common.tables import Table
from experiments.common.timing import in_turns
from experiments.common.training import Training
from experiments.data.batches import epoch_batches
from experiments.data.dataset import Split
from experiments.mnist.network import LAYERS, NETWORK, initial_params, normalised

_BATCH_SIZE = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and returns the exit code."""
    options = _parser().parse_args(argv)
    kinds = {name: Kind(*made) for name, made in _steps().items()}
    kinds["lora, not donated"] = Kind(*_steps()["lora"], donate=False)
    batches = list(epoch_batches(_random_images(), batch_size=_BATCH_SIZE, **_one_epoch()))
    for kind in kinds.values():
        kind.run(batches[: options.steps])
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for order in in_turns(list(kinds), options.rounds):
        for name in order:
            times[name].append(kinds[name].run(batches[: options.steps]))
    results = {
        "milliseconds": {name: 1e3 * float(np.median(found)) for name, found in times.items()},
        "lora_over_hand_written": _ratio(times, "lora", "hand-written"),
        "not_donated_over_donated": _ratio(times, "lora, not donated", "lora"),
        "host_microseconds": {
            "gather a batch": 1e6 * _seconds_to_gather(),
            "dispatch a step": 1e6 * kinds["lora"].seconds_to_dispatch(batches[0]),
        },
    }
    for table in tables(results):
        table.show(Console())
    write_found(options, results)
    return 0


class Kind(Training):
    """One of the trainings, and what its steps take."""

    def run(self, batches: Sequence[Any]) -> float:
        """Takes a step on each batch and returns the seconds that one took."""
        start = time.perf_counter()
        for inputs, labels in batches:
            self.take_step(inputs, labels)
        jax.block_until_ready(self.params)
        return (time.perf_counter() - start) / len(batches)

    def seconds_to_dispatch(self, batch: Any) -> float:
        """Returns the time until a call returns, the device being idle before."""
        times = []
        for _ in range(200):
            jax.block_until_ready(self.params)
            start = time.perf_counter()
            self.take_step(*batch)
            times.append(time.perf_counter() - start)
        return float(np.median(times))


def _steps() -> dict[str, tuple[Callable[..., Any], Any, Any]]:
    params = initial_params(0)
    init = functools.partial(lora_jax.init.gaussian, standard_deviation=1.0)
    wrapped = lora_jax.wrap(params, LAYERS, rank=1, init=init)
    adam = optax.adam(1e-3)
    return {
        "all weights": (NETWORK.apply, params, adam),
        "hand-written": (_by_hand, wrapped, lora_jax.optimizer(adam)),
        "lora": (lora_jax.adapt(NETWORK.apply), wrapped, lora_jax.optimizer(adam)),
    }


def _by_hand(variables: Any, images: jax.Array) -> jax.Array:
    """Returns what the study's network gives, with LoRA written into it."""
    x = normalised(images)
    for name in LAYERS:
        layer = variables["params"][name]
        weight = layer["kernel"]
        base, scale = jax.lax.stop_gradient((weight.base, weight.scale))
        x = x @ base + scale * (x @ weight.lora_A) @ weight.lora_B + layer["bias"]
        x = x if name == LAYERS[-1] else jax.nn.relu(x)
    return x


def _random_images() -> Split:
    random = np.random.default_rng(0)
    return Split(
        random.integers(0, 256, (5_000, 784), np.uint8),
        random.integers(0, 10, 5_000).astype(np.int32),
    )


def _one_epoch() -> dict[str, Any]:
    return {"epochs": 1, "random": np.random.default_rng(0)}


def _seconds_to_gather() -> float:
    batches: Iterator[Any] = iter(
        epoch_batches(_random_images(), batch_size=_BATCH_SIZE, **_one_epoch())
    )
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return (time.perf_counter() - start) / count


def _ratio(times: dict[str, list[float]], kind: str, other: str) -> float:
    """Returns the median over the rounds of one kind's time over another's."""
    return float(np.median(np.divide(times[kind], times[other])))


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Returns what `--json` writes: the times, and ratios that are medians over rounds."""
    ratios = {
        "lora": f"{found['lora_over_hand_written']:.3f} × hand-written",
        "lora, not donated": f"{found['not_donated_over_donated']:.3f} × lora",
    }
    steps = [
        [name, f"{milliseconds:.3f}", ratios.get(name, "")]
        for name, milliseconds in found["milliseconds"].items()
    ]
    host = [[name, f"{taken:.0f}"] for name, taken in found["host_microseconds"].items()]
    return [
        Table(f"MNIST step, batch {_BATCH_SIZE}, rank 1", ["", "ms", "median of ratios"], steps),
        Table("The host's part of a step", ["", "µs"], host),
    ]


def _parser() -> MeasuringParser:
    parser = MeasuringParser("mnist_step", __doc__)
    parser.add_argument("--steps", type=positive_int, default=50, help="steps in a block")
    parser.add_argument("--rounds", type=positive_int, default=20, help="blocks of each kind")
    return parser


if __name__ == "__main__":
    sys.exit(main())
