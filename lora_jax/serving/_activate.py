"""Several adapters of a stack at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from lora_jax._compat import is_tracer
from lora_jax._dtypes import common_dtype
from lora_jax._weight import LoRAWeight
from lora_jax.serving._alike import lora_nodes, map_lora_weights
from lora_jax.serving._stack import capacity_of, check_stacked


def activate(
    stacked: Any, weights: Sequence[float | Array] | Real[Array, "capacity"] | np.ndarray
) -> Any:
    r"""Returns the weighted sum of a stack's adapters as one wrapped tree.

    $W + \sum_i w_i s_i A_i B_i$, exactly: side by side the factors are one adapter of rank
    capacity · r with a scale of 1, whose lora_B takes $w_i s_i$. A weight of 0 switches an adapter
    off. Under `jax.jit` other weights don't recompile.

    Args:
      stacked: what `stack` returned.
      weights: a number for each place (capacity,).

    Returns:
      A wrapped tree, for `adapt` and `merge`.

    Raises:
      ValueError: `weights` has another length or values that are not finite, or the adapters have
        magnitudes (DoRA), which don't add up.

    Source: Hu et al. 2021, section 4.1; the sum of products is the product of the factors side by
    side.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> adapters = [lora_jax.wrap(params, "kernel", rank=2) for _ in range(3)]
      >>> wrapped = lora_jax.activate(lora_jax.stack(adapters), [1.0, 0.0, -0.5])
      >>> wrapped["kernel"].rank
      6
    """
    check_stacked(stacked)
    for path, node in lora_nodes(stacked):
        check_no_magnitude("`stacked`", path, node)
    numbers = checked_weights(weights, capacity_of(stacked))
    return map_lora_weights(lambda node: _activated(node, numbers), stacked)


def check_no_magnitude(name: str, path: str, node: LoRAWeight) -> None:
    """Raises if a weight is one of DoRA, a sum of which is not an adapter."""
    if node.magnitude is not None:
        raise ValueError(
            f"{name} has a magnitude (DoRA) at '{path}', which multiplies the weight, so that such "
            "adapters don't add up; expected plain LoRA. extract(params, merge(wrapped), targets, "
            "rank=...) makes plain adapters of them."
        )


def checked_weights(weights: Any, count: int) -> Array:
    """Returns `count` weights as a float array."""
    array = weights
    if not hasattr(weights, "dtype"):
        is_traced = any(map(is_tracer, jax.tree.leaves(weights)))
        array = (jnp if is_traced else np).asarray(weights, np.float32)
    if array.shape != (count,):
        raise ValueError(
            f"`weights` has the shape {array.shape}; expected a number for each of the {count} "
            "adapters."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(np.float32)
    if not is_tracer(array) and not np.all(np.isfinite(np.asarray(array, np.float64))):
        raise ValueError(f"`weights` is {weights}; expected finite numbers.")
    return jnp.asarray(array)


def _activated(node: LoRAWeight, weights: Array) -> LoRAWeight:
    batch = node.axes.count("batch")
    rank = node.scale.shape[0] * node.rank
    dtype = node.lora_B.dtype
    wide = common_dtype(dtype, node.scale.dtype, weights.dtype, jnp.float32)
    shares = weights.astype(wide) * node.scale.astype(wide)
    shares = shares.reshape(-1, *[1] * (node.lora_B.ndim - 1))
    lora_A = jnp.moveaxis(node.lora_A, 0, -2)
    lora_B = jnp.moveaxis((shares * node.lora_B.astype(wide)).astype(dtype), 0, batch)
    return dataclasses.replace(
        node,
        lora_A=lora_A.reshape(*lora_A.shape[:-2], rank),
        lora_B=lora_B.reshape(*lora_B.shape[:batch], rank, *lora_B.shape[batch + 2 :]),
        scale=jnp.ones((), node.scale.dtype),
    )
