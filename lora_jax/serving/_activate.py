"""Several adapters of a bank at once."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from lora_jax._dtypes import common_dtype
from lora_jax._weight import LoRABank, LoRAWeight
from lora_jax.arithmetic._alike import check_no_magnitude, checked_weights
from lora_jax.serving._bank import bank_index, capacity_of


def activate(
    bank: Any, weights: Sequence[float | Array] | Real[Array, " capacity"] | np.ndarray
) -> Any:
    r"""Returns the weighted sum of a bank's adapters as one wrapped tree.

    The result is exactly $W + \sum_i w_i s_i A_i B_i$: concatenated, the factors form one adapter
    of rank capacity · r with a scale of 1, whose lora_B absorbs $w_i s_i$. A weight of 0 switches
    an adapter off. Under `jax.jit` new weights don't recompile.

    Args:
      bank: what `serving.bank` returned.
      weights: one number for each slot (capacity,).

    Returns:
      A wrapped tree, for `adapt` and `merge`.

    Raises:
      ValueError: `weights` has the wrong length or values that are not finite, or the adapters have
        magnitudes (DoRA), which can't be added.

    Source: Hu et al. 2021, section 4.1; the sum of products is the product of the concatenated
    factors.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> adapters = [lora_jax.wrap(params, "kernel", rank=2) for _ in range(3)]
      >>> wrapped = lora_jax.serving.activate(lora_jax.serving.bank(adapters), [1.0, 0.0, -0.5])
      >>> wrapped["kernel"].rank
      6
    """
    index = bank_index(bank)
    for path, node in index.banks.items():
        check_no_magnitude("`bank`", path, node)
    numbers = checked_weights(weights, capacity_of(index))
    return index.mapped(lambda _, node: _activated(node, numbers))


def _activated(bank: LoRABank, weights: Array) -> LoRAWeight:
    batch = bank.axes.count("batch")
    rank = bank.capacity * bank.rank
    dtype = bank.lora_B.dtype
    wide = common_dtype(dtype, bank.scale.dtype, weights.dtype, jnp.float32)
    shares = weights.astype(wide) * bank.scale.astype(wide)
    shares = shares.reshape(-1, *[1] * (bank.lora_B.ndim - 1))
    lora_A = jnp.moveaxis(bank.lora_A, 0, -2)
    lora_B = jnp.moveaxis((shares * bank.lora_B.astype(wide)).astype(dtype), 0, batch)
    return LoRAWeight(
        base=bank.base,
        lora_A=lora_A.reshape(*lora_A.shape[:-2], rank),
        lora_B=lora_B.reshape(*lora_B.shape[:batch], rank, *lora_B.shape[batch + 2 :]),
        scale=jnp.ones((), bank.scale.dtype),
        axes=bank.axes,
        layers=bank.layers,
        frozen=bank.frozen,
    )
