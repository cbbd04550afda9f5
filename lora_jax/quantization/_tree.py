"""Trees with quantised weights."""

from typing import Any

import jax

from lora_jax.quantization._weight import is_quantized


def dequantize(params: Any) -> Any:
    """Returns params with an array in place of each quantised weight, in the weight's dtype.

    Args:
      params: any tree; a wrapped one keeps its adapters, on dequantised bases.

    Returns:
      The tree with arrays alone.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = lora_jax.quantize({"kernel": jnp.ones((128, 3))}, "kernel")
      >>> lora_jax.quantization.dequantize(params)["kernel"].shape
      (128, 3)
    """
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf, params, is_leaf=is_quantized
    )
