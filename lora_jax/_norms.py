"""The norms of DoRA's weights, and the gain of a magnitude over them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._dtypes import common_dtype, epsilon
from lora_jax._matrices import by_matrix, stack_ndim
from lora_jax._partition import cut_as, feature_sharding
from lora_jax._shapes import (
    AnyArray,
    Axes,
    Layers,
    factor_letters,
    letters,
    weight_letters,
)
from lora_jax._values import over, sum_of_squares, without_nodes
from lora_jax._weight import LoRABank, LoRAWeight, SlotWeight, is_adapter_node

_HIGHEST = jax.lax.Precision.HIGHEST


def squared_norms(base: Any, axes: Axes, layers: Layers | None = None) -> Array:
    """Returns the squared norm of each output feature of a weight, of shape (*batch, *out)."""
    base = without_nodes(base)
    sharding = feature_sharding(base, axes, layers)
    squared = functools.partial(
        _squared_norms, stack=stack_ndim(base, axes), axes=axes, layers=layers
    )
    return cut_as(sharding, squared, base)


# One program, so that an equal stack of matrices is not traced and compiled again.
@functools.partial(jax.jit, static_argnames=("stack", "axes", "layers"), inline=True)
def _squared_norms(base: Any, *, stack: int, axes: Axes, layers: Layers | None) -> Array:
    def squared(part: AnyArray) -> Array:
        return sum_of_squares(part.astype(common_dtype(part.dtype, jnp.float32)), axes)

    return by_matrix(squared, stack, base, axes, layers)


def squared_norm_of(node: LoRAWeight | LoRABank) -> Array:
    r"""Returns $\lVert W \rVert^2$ for each output feature of a DoRA node's base.

    It is cached where the base is an array, which is frozen. A base that is a node may train.
    """
    if is_adapter_node(node.base):
        return squared_norms(node.base, node.axes, node.layers)
    return node.squared_norm


def gain(weight: LoRAWeight) -> Array:
    r"""Returns $m / \lVert W + s A B \rVert$, of shape (*batch, *out), the norm without gradient.

    It is computed in at least float32, whatever the dtype of the magnitude.

    Source: Liu et al. 2024, equations 5 and 11, and section 4.3 on the gradient.
    """
    cached = weight.norm if isinstance(weight, SlotWeight) else None
    norm = norms(weight) if cached is None else cached
    return over(weight.magnitude, jax.lax.stop_gradient(norm))


def norms(weight: LoRAWeight) -> Array:
    r"""Returns $\lVert W + s A B \rVert$, of shape (*batch, *out), without gradient.

    With G = AᵀA, for each output feature o:
    ‖W + sAB‖² = ‖W‖² + 2s⟨W, AB⟩ + s²‖AB‖² = ‖W‖² + 2s Σ_r (WᵀA)_or B_ro + s² Σ_r B_ro (GB)_ro,
    where nothing is larger than W itself, and ‖W‖² was computed once.
    """
    base, axes, layers = without_nodes(weight.base), weight.axes, weight.layers
    weight = dataclasses.replace(weight, base=base, squared_norm=squared_norm_of(weight))
    computed = functools.partial(_norms, stack=stack_ndim(base, axes))
    return cut_as(feature_sharding(base, axes, layers), computed, weight)


@functools.partial(jax.jit, static_argnames="stack", inline=True)
def _norms(weight: LoRAWeight, *, stack: int) -> Array:
    def of_part(part: Array, lora_A: Array, lora_B: Array, squared_norm: Array) -> Array:
        return _norms_of_part(part, lora_A, lora_B, squared_norm, weight.scale, weight.axes)

    return by_matrix(
        of_part,
        stack,
        weight.base,
        weight.axes,
        weight.layers,
        weight.lora_A,
        weight.lora_B,
        weight.squared_norm,
    )


def _norms_of_part(
    part: Array, lora_A: Array, lora_B: Array, squared_norm: Array, scale: Array, axes: Axes
) -> Array:
    if common_dtype(squared_norm.dtype, jnp.float32) != squared_norm.dtype:
        # The tree was cast to half precision, which a squared norm may not fit.
        squared_norm = sum_of_squares(part.astype(common_dtype(part.dtype, jnp.float32)), axes)
    wide = common_dtype(part.dtype, lora_A.dtype, squared_norm.dtype)
    base, lora_A, lora_B, scale, squared_norm = jax.lax.stop_gradient(
        tuple(array.astype(wide) for array in (part, lora_A, lora_B, scale, squared_norm))
    )
    batch, outputs = letters(axes, "batch"), letters(axes, "out")
    A_letters, B_letters = factor_letters(axes)
    mixed = jnp.einsum(
        f"{weight_letters(axes)},{A_letters}->{B_letters}", base, lora_A, precision=_HIGHEST
    )
    gram = jnp.einsum(
        f"{A_letters},{A_letters[:-1]}y->{batch}zy", lora_A, lora_A, precision=_HIGHEST
    )
    spread = jnp.einsum(
        f"{batch}zy,{batch}y{outputs}->{B_letters}", gram, lora_B, precision=_HIGHEST
    )
    cross = 2 * scale * jnp.sum(lora_B * mixed, axis=len(batch))
    squared_change = scale**2 * jnp.sum(lora_B * spread, axis=len(batch))
    # Where the change almost cancels the weight, only rounding is left: a norm below it is
    # meaningless, and could give a gain of any size.
    rounding = 4 * epsilon(wide) * (squared_norm + squared_change)
    return jnp.sqrt(jnp.maximum(squared_norm + cross + squared_change, rounding))


@jax.jit
def fixed_norms(weight: LoRAWeight) -> Array:
    """Returns the same as `norms` of a weight whose factors are fixed, by one program."""
    return norms(weight)
