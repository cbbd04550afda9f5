"""The factored value that an adapted weight becomes when the interpreter takes it up."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._nodes import check_base, check_single, levels_of
from lora_jax._norms import gain
from lora_jax._row_selection import RowSelection
from lora_jax._shapes import (
    Places,
    factor_places,
    magnitude_places,
    row_places,
    spread_layers,
)
from lora_jax._weight import LoRABank, LoRAWeight, SlotWeight, is_lora_weight
from lora_jax.quantization._foreign import ForeignWeight
from lora_jax.quantization._weight import QuantizedWeight, is_quantized
from lora_jax.transform._building import materialized_value
from lora_jax.transform._factored import Factored
from lora_jax.transform._report import Reporter
from lora_jax.transform._terms import Factor, Rows, Slot, Term


def symbolic_weight(
    node: LoRAWeight | LoRABank | QuantizedWeight | ForeignWeight, path: str, reporter: Reporter
) -> Factored:
    """Returns the factored value of a weight; nothing frozen receives a gradient.

    Where the base is a node itself, its terms come first, each under the path of its own level. A
    gain multiplies only what it was made for, so that a base with a gain is built, before any
    dropout; the reporter is told.

    Args:
      node: the weight.
      path: its path in the arguments.
      reporter: is told of a base that is built.

    Raises:
      ValueError: the node holds a bank, or has a base that no node can have.
    """
    if is_quantized(node):
        return Factored(_stopped(node), ())
    weight = cast(LoRAWeight, node)
    check_base(path, weight)
    for each, level in levels_of(path, weight):
        check_single(each, cast(LoRAWeight, level))
    return _value(weight, path, reporter)


def _value(weight: LoRAWeight, path: str, reporter: Reporter) -> Factored:
    stopped = {
        name: jax.lax.stop_gradient(getattr(weight, name)) for name in ("scale", *weight.frozen)
    }
    weight = dataclasses.replace(weight, **stopped)
    base, terms = _base_and_terms(weight.base, f"{path}/base", reporter)
    return Factored(
        base=base,
        terms=(*terms, _term(weight, path)),
        gain=None
        if weight.magnitude is None
        else _factor(weight, gain(weight), magnitude_places(weight.axes), elsewhere=1),
    )


def _base_and_terms(base: Any, path: str, reporter: Reporter) -> tuple[Any, tuple[Term, ...]]:
    """Returns the array at the bottom of a base, and the terms that the base adds itself."""
    if not is_lora_weight(base):
        return _stopped(base), ()
    value = _value(base, path, reporter)
    if value.gain is None:
        return value.base, value.terms
    where = "an adapter of an adapter", "the start of the function"
    return materialized_value(reporter, value, *where), ()


def _stopped(base: Any) -> Any:
    """Returns a frozen base: an array, or codes with scales."""
    return jax.tree.map(jax.lax.stop_gradient, base)


def _term(weight: LoRAWeight, path: str) -> Term:
    if isinstance(weight.lora_A, RowSelection):
        return _term_of_rows(weight, weight.lora_A, path)
    A_places, B_places = factor_places(weight.axes)
    return Term(
        factor_A=_factor(weight, weight.lora_A, A_places, slot=_slot(weight, "bank_A")),
        factor_B=_factor(weight, weight.lora_B, B_places, slot=_slot(weight, "bank_B")),
        scale=weight.scale,
        window=(None,) * len(weight.axes),
        origin=path,
    )


def _term_of_rows(weight: LoRAWeight, selection: RowSelection, path: str) -> Term:
    """Returns the change of single rows: lora_B in a window of these rows, times the number 1.

    The scale multiplies lora_B, which is smaller than anything that is computed with it.
    """
    dtype = weight.lora_B.dtype
    window = Rows(selection.rows)
    return Term(
        factor_A=Factor.of_aligned(jnp.ones((1,) * (len(weight.axes) + 1), dtype)),
        factor_B=Factor(weight.lora_B * weight.scale.astype(dtype), row_places(weight.axes)),
        scale=jnp.ones_like(weight.scale),
        window=tuple(window if role == "in" else None for role in weight.axes),
        origin=path,
    )


def _slot(weight: LoRAWeight, name: str) -> Slot | None:
    """Returns the slot of a bank that a factor of all layers was read from, if it was."""
    if not isinstance(weight, SlotWeight) or weight.layers is not None:
        return None
    return Slot(jax.lax.stop_gradient(getattr(weight, name)), weight.slot)


def _factor(
    weight: LoRAWeight,
    array: Array,
    places: Places,
    *,
    elsewhere: int = 0,
    slot: Slot | None = None,
) -> Factor:
    """Returns an array of the adapted layers extended to all; the others get no change."""
    if weight.layers is not None:
        axis = weight.axes.index("batch")
        array = spread_layers(array, places[axis], weight.layers, weight.shape[axis], elsewhere)
    return Factor(array, places, slot=slot)
