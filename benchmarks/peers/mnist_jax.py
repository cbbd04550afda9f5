"""The MNIST study's training step as `lora_jax` does it, and the file from which all start."""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lora_jax
from benchmarks.peers.batches import read_batches, write_batches
from experiments.common.training import Training
from experiments.mnist.network import ADAPTED_APPLY, LAYERS, initial_params
from lora_jax.exchange import peft

_NAMES = [peft.Rule(f"{layer}.weight", f"{layer}/kernel") for layer in LAYERS]
_FRESH = functools.partial(lora_jax.init.gaussian, standard_deviation=1.0)


def write_start(folder: str, *, rank: int, batch_size: int, batches: int) -> None:
    """Writes the network's weights, new adapters in PEFT's format, and batches of random images."""
    params = initial_params(0)
    np.savez(
        Path(folder) / "network.npz",
        **{f"{layer}.{name}": params[layer][name] for layer in params for name in params[layer]},
    )
    wrapped = lora_jax.wrap(params, LAYERS, rank=rank, init=_FRESH)
    peft.save(Path(folder) / "adapter", wrapped, names=_NAMES)
    random = np.random.default_rng(0)
    write_batches(
        Path(folder) / "batches.npz",
        [
            {
                "images": random.integers(0, 256, (batch_size, 784), np.uint8),
                "labels": random.integers(0, 10, batch_size),
            }
            for _ in range(batches)
        ],
    )


def read_adapters(folder: str, quantize: str | None = None) -> Any:
    """Returns the wrapped params that `write_start` wrote.

    Args:
      folder: where.
      quantize: the format of the base; None for float32.
    """
    start = Path(folder)
    params: dict[str, Any] = {layer: {} for layer in LAYERS}
    with np.load(start / "network.npz") as stored:
        for key in stored.files:
            layer, name = key.split(".")
            params[layer][name] = jax.device_put(stored[key])
    if quantize is not None:
        params = lora_jax.quantize(params, LAYERS, format=quantize)
    return peft.load(start / "adapter", params, names=_NAMES)


class LoraJax:
    """The study's training; see `benchmarks.peers.mnist_torch` for the others'."""

    def __init__(self, folder: str, learning_rate: float) -> None:
        """Reads what `write_start` wrote."""
        tx = lora_jax.optimizer(optax.adam(learning_rate))
        self._training = Training(ADAPTED_APPLY, read_adapters(folder), tx)
        self._batches = [
            (batch["images"], batch["labels"].astype(np.int32))
            for batch in read_batches(Path(folder) / "batches.npz")
        ]

    def steps(self, first: int, count: int) -> dict[str, Any]:
        """Takes a step on each of these batches; returns their losses, and the seconds in all."""
        start = time.perf_counter()
        batches = self._batches[first : first + count]
        losses = [self._training.take_step(*batch) for batch in batches]
        jax.block_until_ready(self._training.params)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "losses": [float(loss) for loss in losses]}

    def versions(self) -> dict[str, str]:
        """Returns what computes."""
        return {"device": str(jax.devices()[0]), "jax": jax.__version__}
