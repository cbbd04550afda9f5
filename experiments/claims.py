"""What LoRA claims of weights, checked on the numbers themselves."""

from typing import Any

import jax
import numpy as np

import lora_jax


def frozen_unchanged(before: Any, wrapped: Any) -> bool:
    """Says whether every weight beneath the adapters is bit for bit what it was before."""
    same = jax.tree.map(
        lambda old, new: np.asarray(old).tobytes() == np.asarray(new).tobytes(),
        before,
        lora_jax.unwrap(wrapped),
    )
    return all(jax.tree.leaves(same))


def max_weight_error(wrapped: Any, merged: Any) -> float:
    """Returns how far merged weights are from W + scale·A·B, computed in float64."""

    def error(node: Any, weight: jax.Array) -> float:
        if not isinstance(node, lora_jax.LoRAWeight):
            return 0.0
        base, lora_A, lora_B, scale = (
            np.asarray(part, np.float64)
            for part in (node.base, node.lora_A, node.lora_B, node.scale)
        )
        return float(np.abs(base + scale * (lora_A @ lora_B) - np.asarray(weight)).max())

    errors = jax.tree.map(
        error, wrapped, merged, is_leaf=lambda node: isinstance(node, lora_jax.LoRAWeight)
    )
    return max(jax.tree.leaves(errors))
