"""The MNIST study's training step with Qwix: its QLoRA around the study's own network."""

from typing import Any

import jax
import numpy as np
import qwix

from benchmarks.peers.mnist_jax import read_adapters
from benchmarks.peers.mnist_quantized import Contender
from experiments.data.images import PIXELS
from experiments.mnist.network import LAYERS, NETWORK

# Qwix takes no tile that leaves a rest. These divide the inputs of the layers, and are the nearest
# to the 64 weights that share a scale here.
TILES = {"hidden_1": 56, "hidden_2": 50, "output": 50}


class Qwix(Contender):
    """The study's training with Qwix."""

    def __init__(self, folder: str, learning_rate: float, qtype: str) -> None:
        """Reads what `benchmarks.peers.mnist_jax.write_start` wrote.

        Args:
          folder: where.
          learning_rate: Adam's.
          qtype: what Qwix calls the dtype of the weights.
        """
        wrapped = read_adapters(folder)
        nodes = {layer: wrapped[layer]["kernel"] for layer in LAYERS}
        rules = [
            qwix.LoraRule(
                module_path=layer,
                rank=node.rank,
                alpha=node.rank * float(node.scale),
                weight_qtype=qtype,
                tile_size=TILES[layer],
            )
            for layer, node in nodes.items()
        ]
        model = qwix.apply_lora_to_model(NETWORK, qwix.LoraProvider(rules))
        created = model.init(jax.random.key(0), np.zeros((1, PIXELS), np.uint8))["params"]
        dense = {
            layer: {"kernel": node.base, "bias": wrapped[layer]["bias"]}
            for layer, node in nodes.items()
        }
        factors = {
            layer: {"kernel_lora_a": node.lora_A, "kernel_lora_b": node.lora_B}
            for layer, node in nodes.items()
        }
        frozen = qwix.quantize_params(dense, created)
        _check_shapes({layer: {**frozen[layer], **factors[layer]} for layer in LAYERS}, created)

        def apply(factors: Any, frozen: Any, images: Any) -> Any:
            params = {layer: {**frozen[layer], **factors[layer]} for layer in LAYERS}
            return model.apply({"params": params}, images)

        super().__init__(folder, learning_rate, factors, frozen, apply)

    def versions(self) -> dict[str, str]:
        """Returns what computes."""
        return {**super().versions(), "qwix": qwix.__version__}


def _check_shapes(given: Any, created: Any) -> None:
    """Raises unless Qwix's model takes these parameters."""
    found, expected = (jax.tree.map(np.shape, dict(tree)) for tree in (given, created))
    if jax.tree.leaves(found) != jax.tree.leaves(expected):
        raise RuntimeError(f"Qwix's model takes {expected}, and was given {found}")
