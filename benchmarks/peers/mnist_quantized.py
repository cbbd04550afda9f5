"""The MNIST study's training step on a quantised base; only the factors are differentiated."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from benchmarks.peers.batches import read_batches
from benchmarks.peers.mnist_jax import read_adapters
from benchmarks.quantized_programs import Memory
from experiments.common.memory import keep_freed_memory
from experiments.common.training import cross_entropy
from experiments.mnist.network import ADAPTED_APPLY


class Contender:
    """A training of factors beside a frozen base, by Adam."""

    def __init__(
        self,
        folder: str,
        learning_rate: float,
        factors: Any,
        frozen: Any,
        apply: Callable[[Any, Any, Any], Any],
    ) -> None:
        """Takes the batches that `benchmarks.peers.mnist_jax.write_start` wrote.

        Args:
          folder: where.
          learning_rate: Adam's.
          factors: what trains.
          frozen: the rest of the parameters.
          apply: `(factors, frozen, images) -> logits`.
        """
        # XLA allocates temporary memory at each call, and a dequantised weight is some of it.
        keep_freed_memory()
        tx = optax.adam(learning_rate)
        self._factors, self._frozen = jax.tree.map(jnp.copy, factors), frozen
        self._state = tx.init(self._factors)
        self._step = _step(apply, tx)
        self._batches = [
            (batch["images"], batch["labels"].astype(np.int32))
            for batch in read_batches(Path(folder) / "batches.npz")
        ]

    def steps(self, first: int, count: int) -> dict[str, Any]:
        """Takes a step on each of these batches; returns their losses, and the seconds in all."""
        start = time.perf_counter()
        losses = []
        for images, labels in self._batches[first : first + count]:
            self._factors, self._state, loss = self._step(
                self._factors, self._state, self._frozen, images, labels
            )
            losses.append(loss)
        jax.block_until_ready(self._factors)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "losses": [float(loss) for loss in losses]}

    def memory(self) -> dict[str, int]:
        """Returns the bytes of the arguments and of the temporary memory of a step."""
        arguments = (self._factors, self._state, self._frozen, *self._batches[0])
        memory = Memory.of(self._step.lower(*arguments).compile())
        return {"argument_bytes": memory.arguments, "temporary_bytes": memory.temporary}

    def versions(self) -> dict[str, str]:
        """Returns what computes."""
        return {"device": str(jax.devices()[0]), "jax": jax.__version__}


class LoraJax(Contender):
    """The training as `lora_jax` does it; see `benchmarks.peers.mnist_qwix` for Qwix's."""

    def __init__(self, folder: str, learning_rate: float, quantize: str | None = None) -> None:
        """Takes the format of the base; None for float32."""
        adapters, frozen = lora_jax.split(read_adapters(folder, quantize))

        def apply(adapters: Any, frozen: Any, images: Any) -> Any:
            return ADAPTED_APPLY({"params": lora_jax.combine(adapters, frozen)}, images)

        super().__init__(folder, learning_rate, adapters, frozen, apply)


def _step(apply: Callable[[Any, Any, Any], Any], tx: optax.GradientTransformation) -> Any:
    def step(factors: Any, state: Any, frozen: Any, images: Any, labels: Any) -> Any:
        def loss_of(factors: Any) -> Any:
            return cross_entropy(apply(factors, frozen, images), labels)

        loss, gradients = jax.value_and_grad(loss_of)(factors)
        updates, state = tx.update(gradients, state, factors)
        return optax.apply_updates(factors, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))
