"""The values that a `LoRAWeight` represents."""

import dataclasses
import functools
import string
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._dtypes import common_dtype, epsilon, smallest
from lora_jax._matrices import by_matrix, stack_ndim, with_quantized_layers
from lora_jax._partition import base_sharding, cut_as, feature_sharding
from lora_jax._row_selection import RowSelection
from lora_jax._shapes import (
    AnyArray,
    Axes,
    Layers,
    aligned,
    magnitude_places,
    positions,
    row_places,
    taken_layers,
    with_layers,
)
from lora_jax._weight import (
    LoRABank,
    LoRAWeight,
    SlotWeight,
    is_adapter_node,
    is_lora_weight,
)
from lora_jax.quantization._encode import Encoding, requantized
from lora_jax.quantization._foreign import ForeignWeight
from lora_jax.quantization._programs import leaf_shardings, quantized_in_place
from lora_jax.quantization._weight import AnyWeight, QuantizedWeight, is_quantized

_LETTERS = string.ascii_lowercase[:-2]
_HIGHEST = jax.lax.Precision.HIGHEST


def lora_weight(
    original: AnyWeight | LoRAWeight,
    lora_A: Array | RowSelection,
    lora_B: Array,
    scale: Array,
    axes: Axes,
    *,
    magnitude: Array | None = None,
    initial_A: Array | None = None,
    initial_B: Array | None = None,
    layers: Layers | None = None,
    frozen: tuple[str, ...] = (),
    encoding: tuple[Any, ...] | None = None,
) -> LoRAWeight:
    """Returns the node with these leaves on an original weight.

    Everything derived from the weight is computed here alone, so that adapters restored beside the
    same weight get the same base and norms, bit for bit.
    """
    base: Any = original if encoding is None else as_array(original)
    if initial_A is not None and initial_B is not None:
        base = _shifted(base, -initial_A, initial_B, axes, layers)
    if encoding is not None:
        base = quantized_in_place(base, axes, Encoding(*encoding))
    return LoRAWeight(
        base=base,
        lora_A=lora_A,
        lora_B=lora_B,
        scale=scale,
        axes=axes,
        magnitude=magnitude,
        squared_norm=_cached_squared_norm(base, axes, layers, magnitude),
        initial_A=initial_A,
        initial_B=initial_B,
        layers=layers,
        frozen=frozen,
        encoding=encoding,
    )


def lora_bank(
    original: AnyWeight | LoRAWeight,
    lora_A: Array,
    lora_B: Array,
    scale: Array,
    axes: Axes,
    *,
    magnitude: Array | None = None,
    layers: Layers | None = None,
    frozen: tuple[str, ...] = (),
) -> LoRABank:
    """Returns the bank with these leaves on an original weight; the norms are computed here."""
    bank = LoRABank(
        base=original,
        lora_A=lora_A,
        lora_B=lora_B,
        scale=scale,
        axes=axes,
        magnitude=magnitude,
        squared_norm=_cached_squared_norm(original, axes, layers, magnitude),
        layers=layers,
        frozen=frozen,
    )
    return with_norms(bank)


def with_norms(bank: LoRABank) -> LoRABank:
    """Caches the DoRA norms of a bank whose factors are fixed, if it has magnitudes.

    They are computed one after the other, each by the same program, so that they equal the norms of
    the single adapters, bit for bit.
    """
    if bank.magnitude is None:
        return bank
    adapters = [
        LoRAWeight(
            base=bank.base,
            lora_A=lora_A,
            lora_B=lora_B,
            scale=scale,
            axes=bank.axes,
            magnitude=magnitude,
            squared_norm=bank.squared_norm,
            layers=bank.layers,
            frozen=bank.frozen,
        )
        for lora_A, lora_B, scale, magnitude in zip(
            bank.lora_A, bank.lora_B, bank.scale, bank.magnitude, strict=True
        )
    ]
    return dataclasses.replace(bank, norm=jnp.stack([fixed_norms(each) for each in adapters]))


def original(node: Any) -> Any:
    """Returns the weight that was wrapped; to rounding where an initialiser changed the base."""
    if not is_adapter_node(node):
        return node
    base = original(node.base)
    if is_lora_weight(node) and node.encoding is not None:
        base = as_array(base)
    if not is_lora_weight(node) or node.initial_A is None:
        return base
    return _shifted(base, node.initial_A, node.initial_B, node.axes, node.layers)


def original_array(node: Any) -> Any:
    """Returns the weight that was wrapped as an array, which is not quantised again."""
    base = original_array(node.base) if is_adapter_node(node) else as_array(node)
    if not is_lora_weight(node) or node.initial_A is None:
        return base
    return _shifted(base, node.initial_A, node.initial_B, node.axes, node.layers)


def as_array(base: Any) -> Any:
    """Returns a base as an array: the value that it represents, if it is a node itself."""
    if is_quantized(base):
        return base.dequantize()
    return dense(base) if is_lora_weight(base) else base


def _without_nodes(base: Any) -> Any:
    """Returns a base as an array or a quantised weight: if it is a node, the value of that."""
    return dense(base) if is_lora_weight(base) else base


def on_original(weight: LoRAWeight) -> LoRAWeight:
    r"""Returns the same weight with its original base, and with factors of twice the rank.

    An initialiser that moved $s A_0 B_0$ into the factors left $W_0 = W - s A_0 B_0$, so
    $W_0 + s A B = W + s\,[A, A_0]\,[B; -B_0]$; here with the scale in lora_A's second half. A
    quantised original is an array then: quantised again, it would be another model.
    """
    if weight.initial_A is None:
        return weight
    rank_axis = len(positions(weight.axes, "batch"))
    wide = common_dtype(weight.lora_A.dtype, weight.initial_A.dtype)
    scaled_A = weight.scale.astype(wide) * weight.lora_A.astype(wide)
    lora_A = jnp.concatenate([scaled_A, weight.initial_A.astype(wide)], axis=-1)
    lora_B = jnp.concatenate(
        [weight.lora_B.astype(wide), -weight.initial_B.astype(wide)], axis=rank_axis
    )
    return lora_weight(
        original_array(weight),
        lora_A,
        lora_B,
        jnp.ones_like(weight.scale),
        weight.axes,
        magnitude=weight.magnitude,
        layers=weight.layers,
        frozen=weight.frozen,
    )


def low_rank(lora_A: AnyArray, lora_B: AnyArray, axes: Axes) -> Array:
    """Returns lora_A · lora_B with the axes of the weight."""
    return jnp.einsum(
        f"{_A_letters(axes)},{_B_letters(axes)}->{_LETTERS[: len(axes)]}",
        lora_A,
        lora_B,
        precision=_HIGHEST,
    )


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
    norm = jax.lax.stop_gradient(jnp.sqrt(_sum_of_squares(value, axes)))
    gain = aligned(_over(magnitude, norm), magnitude_places(axes))
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


def squared_norms(base: Any, axes: Axes, layers: Layers | None = None) -> Array:
    """Returns the squared norm of each output feature of a weight, of shape (*batch, *out)."""
    base = _without_nodes(base)
    sharding = feature_sharding(base, axes, layers)
    squared = functools.partial(
        _squared_norms, stack=stack_ndim(base, axes), axes=axes, layers=layers
    )
    return cut_as(sharding, squared, base)


# One program, so that an equal stack of matrices is not traced and compiled again.
@functools.partial(jax.jit, static_argnames=("stack", "axes", "layers"), inline=True)
def _squared_norms(base: Any, *, stack: int, axes: Axes, layers: Layers | None) -> Array:
    def squared(part: AnyArray) -> Array:
        return _sum_of_squares(part.astype(common_dtype(part.dtype, jnp.float32)), axes)

    return by_matrix(squared, stack, base, axes, layers)


def squared_norm_of(node: LoRAWeight | LoRABank) -> Array:
    r"""Returns $\lVert W \rVert^2$ for each output feature of a DoRA node's base.

    It is cached where the base is an array, which is frozen. A base that is a node may train.
    """
    if is_adapter_node(node.base):
        return squared_norms(node.base, node.axes, node.layers)
    return node.squared_norm


def _cached_squared_norm(
    base: Any, axes: Axes, layers: Layers | None, magnitude: Array | None
) -> Array | None:
    if magnitude is None or is_adapter_node(base):
        return None
    return squared_norms(base, axes, layers)


def gain(weight: LoRAWeight) -> Array:
    r"""Returns $m / \lVert W + s A B \rVert$, of shape (*batch, *out), the norm without gradient.

    It is computed in at least float32, whatever the dtype of the magnitude.

    Source: Liu et al. 2024, equations 5 and 11, and section 4.3 on the gradient.
    """
    cached = weight.norm if isinstance(weight, SlotWeight) else None
    norm = norms(weight) if cached is None else cached
    return _over(weight.magnitude, jax.lax.stop_gradient(norm))


def norms(weight: LoRAWeight) -> Array:
    r"""Returns $\lVert W + s A B \rVert$, of shape (*batch, *out), without gradient.

    With G = AᵀA, for each output feature o:
    ‖W + sAB‖² = ‖W‖² + 2s⟨W, AB⟩ + s²‖AB‖² = ‖W‖² + 2s Σ_r (WᵀA)_or B_ro + s² Σ_r B_ro (GB)_ro,
    where nothing is larger than W itself, and ‖W‖² was computed once.
    """
    base, axes, layers = _without_nodes(weight.base), weight.axes, weight.layers
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
        squared_norm = _sum_of_squares(part.astype(common_dtype(part.dtype, jnp.float32)), axes)
    wide = common_dtype(part.dtype, lora_A.dtype, squared_norm.dtype)
    base, lora_A, lora_B, scale, squared_norm = jax.lax.stop_gradient(
        tuple(array.astype(wide) for array in (part, lora_A, lora_B, scale, squared_norm))
    )
    batch = _letters(positions(axes, "batch"))
    outputs = _letters(positions(axes, "out"))
    A_letters, B_letters = _A_letters(axes), _B_letters(axes)
    mixed = jnp.einsum(
        f"{_LETTERS[: len(axes)]},{A_letters}->{B_letters}", base, lora_A, precision=_HIGHEST
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


def _shifted(
    base: Any, initial_A: Array, initial_B: Array, axes: Axes, layers: Layers | None
) -> Any:
    """Returns base + initial_A · initial_B in the base's dtype, quantised if the base is."""
    if isinstance(base, ForeignWeight):
        raise ValueError(
            "An initialiser changes the base, which is a quantised array of another library; "
            "expected one that keeps it, such as 'kaiming', or quantization.dequantize(params)."
        )
    one = jnp.ones((), common_dtype(initial_A.dtype, jnp.float32))
    adapter = LoRAWeight(base, initial_A, initial_B, one, axes, layers=layers)
    return requantized_value(adapter) if isinstance(base, QuantizedWeight) else dense(adapter)


def _over(magnitude: Array, norm: Array) -> Array:
    """Returns magnitude / norm, at least in float32; an output feature that is zero stays zero."""
    wide = common_dtype(magnitude.dtype, norm.dtype, jnp.float32)
    magnitude, norm = magnitude.astype(wide), norm.astype(wide)
    return magnitude / jnp.maximum(norm, smallest(wide))


def _sum_of_squares(weight: AnyArray, axes: Axes) -> Array:
    total = jnp.sum(weight**2, axis=positions(axes, "in"))
    kept = [axis for axis in range(len(axes)) if axes[axis] != "in"]
    return total.transpose([kept.index(axis) for axis in positions(axes, "batch", "out")])


def _letters(held: tuple[int, ...]) -> str:
    return "".join(_LETTERS[axis] for axis in held)


def _A_letters(axes: Axes) -> str:
    return f"{_letters(positions(axes, 'batch', 'in'))}z"


def _B_letters(axes: Axes) -> str:
    return f"{_letters(positions(axes, 'batch'))}z{_letters(positions(axes, 'out'))}"
