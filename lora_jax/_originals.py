"""Nodes made on an original weight, and the original of a node."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._dtypes import common_dtype
from lora_jax._norms import fixed_norms, squared_norms
from lora_jax._row_selection import RowSelection
from lora_jax._shapes import Axes, Layers, positions
from lora_jax._values import as_array, dense, requantized_value
from lora_jax._weight import LoRABank, LoRAWeight, is_adapter_node, is_lora_weight
from lora_jax.quantization._encode import Encoding
from lora_jax.quantization._foreign import ForeignWeight
from lora_jax.quantization._programs import quantized_in_place
from lora_jax.quantization._weight import AnyWeight, QuantizedWeight


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


def _cached_squared_norm(
    base: Any, axes: Axes, layers: Layers | None, magnitude: Array | None
) -> Array | None:
    if magnitude is None or is_adapter_node(base):
        return None
    return squared_norms(base, axes, layers)


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
