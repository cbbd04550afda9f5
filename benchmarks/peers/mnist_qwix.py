"""The MNIST study's training step with Qwix: its QLoRA around the study's own network."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix

from benchmarks.peers.batches import read_batches
from benchmarks.peers.mnist_jax import memory_of, read_adapters
from experiments.common.memory import keep_freed_memory
from experiments.common.training import cross_entropy
from experiments.data.images import PIXELS
from experiments.mnist.network import LAYERS, NETWORK

# Qwix takes no tile that leaves a rest: these divide the inputs of the layers, and are the nearest
# to the 64 weights that share a scale here.
TILES = {"hidden_1": 56, "hidden_2": 50, "output": 50}


class Qwix:
    """The study's training with Qwix; only its factors are differentiated and updated."""

    def __init__(
        self, folder: str, learning_rate: float, qtype: str, keeps_memory: bool = False
    ) -> None:
        """Reads what `benchmarks.peers.mnist_jax.write_start` wrote.

        Args:
          folder: where.
          learning_rate: Adam's.
          qtype: what Qwix calls the dtype of the weights.
          keeps_memory: whether the process keeps what it frees, for the next step.
        """
        if keeps_memory:
            keep_freed_memory()
        wrapped = read_adapters(folder)
        rank = wrapped[LAYERS[0]]["kernel"].rank
        rules = [
            qwix.LoraRule(
                module_path=layer,
                rank=rank,
                alpha=rank * float(wrapped[layer]["kernel"].scale),
                weight_qtype=qtype,
                tile_size=TILES[layer],
            )
            for layer in LAYERS
        ]
        model = qwix.apply_lora_to_model(NETWORK, qwix.LoraProvider(rules))
        images = np.zeros((1, PIXELS), np.uint8)
        params = model.init(jax.random.key(0), images)["params"]
        plain = {
            layer: {"kernel": wrapped[layer]["kernel"].base, "bias": wrapped[layer]["bias"]}
            for layer in LAYERS
        }
        given = qwix.quantize_params(plain, params)
        self._factors = {
            layer: {
                "kernel_lora_a": jnp.copy(wrapped[layer]["kernel"].lora_A),
                "kernel_lora_b": jnp.copy(wrapped[layer]["kernel"].lora_B),
            }
            for layer in LAYERS
        }
        self._frozen = {layer: {**params[layer], **given[layer]} for layer in LAYERS}
        for layer in LAYERS:
            for name, factor in self._factors[layer].items():
                if self._frozen[layer].pop(name).shape != factor.shape:
                    raise RuntimeError(f"Qwix has another shape of {layer}/{name}")
        tx = optax.adam(learning_rate)
        self._state = tx.init(self._factors)
        self._step = _step(model.apply, tx)
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
        return memory_of(self._step.lower(*arguments).compile())

    def versions(self) -> dict[str, str]:
        """Returns what computes."""
        return {"device": str(jax.devices()[0]), "jax": jax.__version__, "qwix": qwix.__version__}


def _step(apply: Callable[..., Any], tx: optax.GradientTransformation) -> Any:
    def step(factors: Any, state: Any, frozen: Any, images: Any, labels: Any) -> Any:
        def loss_of(factors: Any) -> Any:
            params = {layer: {**frozen[layer], **factors[layer]} for layer in LAYERS}
            return cross_entropy(apply({"params": params}, images), labels)

        loss, gradients = jax.value_and_grad(loss_of)(factors)
        updates, state = tx.update(gradients, state, factors)
        return optax.apply_updates(factors, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))
