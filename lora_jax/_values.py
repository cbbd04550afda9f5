"""The values that a `LoRAWeight` represents."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._dtypes import common_dtype, smallest
from lora_jax._matrices import by_matrix, stack_ndim, with_quantized_layers
from lora_jax._partition import base_sharding, cut_as
from lora_jax._row_selection import RowSelection
from lora_jax._shapes import (
    AnyArray,
    Axes,
    aligned,
    factor_letters,
    magnitude_places,
    positions,
    row_places,
    taken_layers,
    weight_letters,
    with_layers,
)
from lora_jax._weight import LoRAWeight, is_lora_weight
from lora_jax.quantization._encode import requantized
from lora_jax.quantization._programs import leaf_shardings
from lora_jax.quantization._weight import QuantizedWeight, is_quantized

_HIGHEST = jax.lax.Precision.HIGHEST


def as_array(base: Any) -> Any:
    """Returns a base as an array: the value that it represents, if it is a node itself."""
    if is_quantized(base):
        return base.dequantize()
    return dense(base) if is_lora_weight(base) else base


def without_nodes(base: Any) -> Any:
    """Returns a base as an array or a quantised weight: if it is a node, the value of that."""
    return dense(base) if is_lora_weight(base) else base


def dense(weight: LoRAWeight) -> Array:
    """Returns the value of a weight, computed in at least float32 and cast once."""
    weight = dataclasses.replace(weight, base=as_array(weight.base))
    return cut_as(base_sharding(weight.base), _dense, weight)


# One program, so that even outside of jit only A · B is held beside W and the result.
@functools.partial(jax.jit, inline=True)
def _dense(weight: LoRAWeight) -> Array:
    part = taken_layers(weight.base, weight.axes, weight.layers)
    value = value_of_part(
        part, weight.lora_A, weight.lora_B, weight.scale, weight.magnitude, weight.axes
    )
    return with_layers(weight.base, value.astype(weight.dtype), weight.axes, weight.layers)


def value_of_part(
    part: AnyArray,
    lora_A: Array | RowSelection,
    lora_B: Array,
    scale: Array,
    magnitude: Array | None,
    axes: Axes,
) -> Array:
    r"""Returns $W + s A B$, with a magnitude $m \circ (W + s A B) / \lVert W + s A B \rVert$.

    It is computed in at least float32, and not cast.

    Args:
      part: $W$, the adapted layers alone.
      lora_A: $A$.
      lora_B: $B$.
      scale: $s$.
      magnitude: $m$, or None.
      axes: the role of each axis of `part`.
    """
    value = _with_change(part, lora_A, lora_B, scale, axes)
    if magnitude is None:
        return value
    norm = jax.lax.stop_gradient(jnp.sqrt(sum_of_squares(value, axes)))
    gain = aligned(over(magnitude, norm), magnitude_places(axes))
    return value * gain.squeeze(-1).astype(value.dtype)


def without_change(merged: Array, weight: LoRAWeight) -> Array:
    r"""Returns $W' - s A B$, the inverse of `dense` for a weight without a magnitude."""

    def computed(merged: Array, weight: LoRAWeight) -> Array:
        part = taken_layers(merged, weight.axes, weight.layers)
        base = _with_change(part, weight.lora_A, weight.lora_B, -weight.scale, weight.axes)
        return with_layers(merged, base.astype(merged.dtype), weight.axes, weight.layers)

    adapter = dataclasses.replace(weight, base=None)
    return cut_as(base_sharding(merged), computed, merged, adapter)


def _with_change(
    part: AnyArray, lora_A: Array | RowSelection, lora_B: Array, scale: Array, axes: Axes
) -> Array:
    """Returns part + scale · A · B in at least float32."""
    if isinstance(lora_A, RowSelection):
        wide = common_dtype(part.dtype, lora_B.dtype, jnp.float32)
        change = aligned(scale.astype(wide) * lora_B.astype(wide), row_places(axes)).squeeze(-1)
        index = tuple(lora_A.rows if role == "in" else slice(None) for role in axes)
        return jnp.asarray(part).astype(wide).at[index].add(change, mode="drop")
    wide = common_dtype(part.dtype, lora_A.dtype, jnp.float32)
    change = low_rank(lora_A.astype(wide), lora_B.astype(wide), axes)
    return jnp.asarray(part).astype(wide) + scale.astype(wide) * change


def low_rank(lora_A: AnyArray, lora_B: AnyArray, axes: Axes) -> Array:
    """Returns lora_A · lora_B with the axes of the weight."""
    A_letters, B_letters = factor_letters(axes)
    equation = f"{A_letters},{B_letters}->{weight_letters(axes)}"
    return jnp.einsum(equation, lora_A, lora_B, precision=_HIGHEST)


def requantized_value(weight: LoRAWeight) -> QuantizedWeight:
    """Returns the value of a weight on a quantised base, quantised as the base is.

    The layers that are not adapted keep their codes.
    """
    base = weight.base
    stack = stack_ndim(base, weight.axes)
    computed = functools.partial(_requantized_value, stack=stack)
    return cut_as(leaf_shardings(base, base), computed, weight)


@functools.partial(jax.jit, static_argnames="stack", inline=True)
def _requantized_value(weight: LoRAWeight, *, stack: int) -> QuantizedWeight:
    base, axes, layers = weight.base, weight.axes, weight.layers

    def of_part(part: Array, lora_A: Any, lora_B: Array, magnitude: Any) -> QuantizedWeight:
        value = value_of_part(part, lora_A, lora_B, weight.scale, magnitude, axes)
        return requantized(value, base, at_once=not stack)

    if layers is None or (base.batch_ndim and axes[0] == "batch"):
        arrays = (weight.lora_A, weight.lora_B, weight.magnitude)
        part = by_matrix(of_part, stack, base, axes, layers, *arrays)
        return with_quantized_layers(base, part, layers)
    return requantized(_dense(dataclasses.replace(weight, base=base.dequantize())), base)


def over(magnitude: Array, norm: Array) -> Array:
    """Returns magnitude / norm, at least in float32; an output feature that is zero stays zero."""
    wide = common_dtype(magnitude.dtype, norm.dtype, jnp.float32)
    magnitude, norm = magnitude.astype(wide), norm.astype(wide)
    return magnitude / jnp.maximum(norm, smallest(wide))


def sum_of_squares(weight: AnyArray, axes: Axes) -> Array:
    """Returns the sum over the inputs of each output feature, of shape (*batch, *out)."""
    total = jnp.sum(weight**2, axis=positions(axes, "in"))
    kept = [axis for axis in range(len(axes)) if axes[axis] != "in"]
    return total.transpose([kept.index(axis) for axis in positions(axes, "batch", "out")])
