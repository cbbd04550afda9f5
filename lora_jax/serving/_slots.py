"""The slots of one weight's bank: filling one, reading one, and what an empty one holds."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._dtypes import common_dtype
from lora_jax._norms import fixed_norms, squared_norm_of
from lora_jax._weight import LoRABank, LoRAWeight, SlotWeight

# The fields with a separate value for each slot.
_NUMBERS = ("lora_A", "lora_B", "scale", "magnitude", "norm")


def bank_of(adapters: Sequence[LoRAWeight], capacity: int) -> LoRABank:
    """Returns a bank of one weight whose first slots hold these adapters of equal shapes."""
    first = adapters[0]
    numbers = [numbers_of(adapter) for adapter in adapters]
    slots = _filled_up(numbers, empty_numbers(first), capacity)
    frozen = {adapter.frozen for adapter in adapters}
    return LoRABank(
        base=first.base,
        axes=first.axes,
        squared_norm=first.squared_norm,
        layers=first.layers,
        frozen=frozen.pop() if len(frozen) == 1 else (),
        **slots,
    )


def slot_of(bank: LoRABank, adapter_id: int | Array) -> SlotWeight:
    """Returns one adapter of a weight's bank; for an unknown slot, one that changes nothing.

    Args:
      bank: the bank.
      adapter_id: the slot, which may be traced.
    """
    adapter_id = jnp.asarray(adapter_id).astype(jnp.int32)
    chosen = _chosen(slot_arrays(bank), _norm_of(bank), adapter_id)
    return SlotWeight(
        base=bank.base,
        axes=bank.axes,
        squared_norm=bank.squared_norm,
        layers=bank.layers,
        frozen=bank.frozen,
        bank_A=bank.lora_A,
        bank_B=bank.lora_B,
        slot=adapter_id,
        **chosen,
    )


@functools.partial(jax.jit, inline=True)
def _chosen(arrays: Mapping[str, Array], norm: Array | None, adapter_id: Array) -> dict[str, Any]:
    """Returns what one slot of a bank's arrays holds, or for an unknown one what an empty one does.

    It is chosen, not multiplied by zero: another adapter's infinity must not reach the base.
    """
    capacity = len(arrays["scale"])
    is_known = (adapter_id >= 0) & (adapter_id < capacity)
    slot = jnp.clip(adapter_id, 0, capacity - 1)
    held = {
        name: jax.lax.dynamic_index_in_dim(array, slot, keepdims=False)
        for name, array in arrays.items()
    }
    return {
        name: jnp.where(is_known, held[name], empty) for name, empty in _empty(held, norm).items()
    }


def without_bank(weight: SlotWeight) -> LoRAWeight:
    """Returns the weight without its bank and cached norm, so that its factors may change."""
    return LoRAWeight(
        base=weight.base,
        lora_A=weight.lora_A,
        lora_B=weight.lora_B,
        scale=weight.scale,
        axes=weight.axes,
        magnitude=weight.magnitude,
        squared_norm=weight.squared_norm,
        layers=weight.layers,
        frozen=weight.frozen,
    )


def slot_arrays(bank: LoRABank) -> dict[str, Array]:
    """Returns the fields with a separate value for each slot, by name."""
    arrays = {name: getattr(bank, name) for name in _NUMBERS}
    return {name: array for name, array in arrays.items() if array is not None}


def numbers_of(adapter: LoRAWeight) -> dict[str, Any]:
    """Returns what an adapter puts into its slot, by name; with a magnitude, its norm too."""
    numbers = {"lora_A": adapter.lora_A, "lora_B": adapter.lora_B, "scale": adapter.scale}
    if adapter.magnitude is None:
        return numbers
    return {**numbers, "magnitude": adapter.magnitude, "norm": fixed_norms(adapter)}


def empty_numbers(adapter: LoRAWeight) -> dict[str, Any]:
    """Returns what an empty slot holds in place of this adapter, so that it computes the base.

    Its magnitude equals its norm, so the gain is 1.
    """
    like = {"lora_A": adapter.lora_A, "lora_B": adapter.lora_B, "scale": adapter.scale}
    if adapter.magnitude is not None:
        like |= {"magnitude": adapter.magnitude, "norm": squared_norm_of(adapter)}
    return _empty(like, _norm_of(adapter))


def _norm_of(node: LoRAWeight | LoRABank) -> Array | None:
    """Returns the norm of the base of a node with a magnitude."""
    return None if node.magnitude is None else jnp.sqrt(squared_norm_of(node))


def _empty(like: Mapping[str, Array], norm: Array | None) -> dict[str, Any]:
    """Returns what an empty slot holds beside a base of this norm, in the dtypes of `like`."""
    return {
        name: jnp.zeros_like(array)
        if norm is None or name not in ("magnitude", "norm")
        else norm.astype(array.dtype)
        for name, array in like.items()
    }


@functools.partial(jax.jit, static_argnames="capacity", inline=True)
def _filled_up(
    numbers: Sequence[Mapping[str, Array]], empty: Mapping[str, Array], capacity: int
) -> dict[str, Any]:
    """Returns what the slots hold as one array of each name, with `empty` in those left over."""
    return {
        name: _as_one([each[name] for each in numbers], array, capacity)
        for name, array in empty.items()
    }


def _as_one(arrays: Sequence[Array], empty: Array, capacity: int) -> Array:
    """Returns the arrays as one, in a dtype that holds all, with `empty` in the other slots."""
    dtype = common_dtype(*(array.dtype for array in arrays))
    rest = jnp.broadcast_to(empty.astype(dtype), (capacity - len(arrays), *empty.shape))
    return jnp.concatenate([jnp.stack([array.astype(dtype) for array in arrays]), rest])
