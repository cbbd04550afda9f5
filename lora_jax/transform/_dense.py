"""A factored value as one array: how it is built, and what that costs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._dtypes import common_dtype
from lora_jax._shapes import Size
from lora_jax.transform._bases import array_of
from lora_jax.transform._deferred import Deferred, is_deferred
from lora_jax.transform._factored import Factored, multiplied
from lora_jax.transform._product import product, without_unit_axes
from lora_jax.transform._terms import Term, block_shape, plus_block


def dense_value(value: Factored) -> Array:
    """Returns gain ∘ (base + Σ terms) in the base's dtype, computed in the widest one."""
    total = array_of(value)
    for term in value.terms:
        block = _dense_block(term, value.shape, value.dtype)
        wide = common_dtype(total.dtype, block.dtype)
        total = plus_block(total.astype(wide), block.astype(wide), term.window)
    if value.gain is not None:
        total = multiplied(total, value.gain.aligned.squeeze(-1))
    return total.astype(value.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Built(Deferred):
    """The sum of a value with a deferred base, built where an op needs it.

    Attributes:
      value: the value.
    """

    value: Factored

    @property
    def like(self) -> Any:
        """The value."""
        return self.value

    def dequantize(self) -> Array:
        """Returns the sum as an array."""
        return dense_value(self.value)


def built(value: Factored) -> Any:
    """Returns a value without terms: an array, or a base that is built where an op needs it."""
    return Factored(Built(value), ()) if is_deferred(value.base) else dense_value(value)


def is_as_exact_dense(value: Factored) -> bool:
    """Says whether the weight's dtype is wide enough for the terms' changes."""
    factors = [factor.dtype for term in value.terms for factor in (term.lora_A, term.lora_B)]
    return bool(common_dtype(value.dtype, *factors) == value.dtype)


def dense_flops(value: Factored) -> Size:
    """Returns the FLOPs of building base + Σ terms."""
    return sum(
        term.building_flops * math.prod(block_shape(term, value.shape)) for term in value.terms
    )


def _dense_block(term: Term, shape: tuple[Size, ...], dtype: Any) -> Array:
    """Returns scale · Σ_r lora_A · lora_B in the term's windows, in `dtype` if that is wider."""
    axes = range(len(shape))
    rank_label = len(shape)
    wide = common_dtype(dtype, term.lora_A.dtype, term.lora_B.dtype)
    joined = product(
        [
            without_unit_axes(factor.astype(wide), (*axes, rank_label))
            for factor in (term.lora_A, term.lora_B)
        ],
        axes,
        scale=term.scale,
        precision=jax.lax.Precision.HIGHEST,
    )
    absent = [axis for axis in axes if axis not in joined.labels]
    return jnp.broadcast_to(jnp.expand_dims(joined.array, absent), block_shape(term, shape))
