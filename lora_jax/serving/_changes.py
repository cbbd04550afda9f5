"""Changing which adapters a bank holds, without changing a shape."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import is_tracer
from lora_jax._dtypes import common_dtype
from lora_jax._nodes import NodeIndex
from lora_jax._originals import on_original
from lora_jax._weight import LoRABank, LoRAWeight
from lora_jax.arithmetic._alike import (
    check_adapter,
    check_same_model,
    common_layers,
    spread,
    with_rank,
)
from lora_jax.serving._bank import (
    bank_index,
    capacity_of,
    check_known,
    checked_id,
    occupied_slots,
)
from lora_jax.serving._slots import (
    empty_numbers,
    numbers_of,
    slot_arrays,
    slot_of,
    without_bank,
)


def add(bank: Any, wrapped: Any) -> tuple[Any, int]:
    """Returns the bank with one more adapter, and its id: the first free slot.

    Args:
      bank: what `serving.bank([...], capacity=...)` returned.
      wrapped: an adapter of the same params and targets, of at most the bank's rank.

    Returns:
      bank: the bank, of the same shapes.
      adapter_id: the adapter's id.

    Raises:
      ValueError: the bank is full, or the adapter does not fit it.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> wrapped = lora_jax.wrap(params, "kernel", rank=2)
      >>> bank = lora_jax.serving.bank([wrapped], capacity=3)
      >>> bank, adapter_id = lora_jax.serving.add(bank, wrapped)
      >>> adapter_id
      1
    """
    index = bank_index(bank)
    taken, capacity = set(occupied_slots(index)), capacity_of(index)
    free = next((slot for slot in range(capacity) if slot not in taken), None)
    if free is None:
        raise ValueError(
            f"`bank` is full: all of its {capacity} slots hold adapters. "
            "serving.remove(bank, id) frees one, and serving.bank([...], capacity=...) makes a "
            "larger bank."
        )
    return _replaced(index, wrapped, free), free


def replace(bank: Any, wrapped: Any, *, adapter_id: int | Array) -> Any:
    """Returns the bank with the contents of one slot replaced by an adapter.

    Args:
      bank: what `serving.bank([...], capacity=...)` returned.
      wrapped: an adapter of the same params and targets, of at most the bank's rank.
      adapter_id: the slot, from 0 to below the capacity. Under `jax.jit` it may be traced, and a
        donated bank is updated in place; an id out of range then changes nothing.

    Returns:
      The bank, of the same shapes.

    Raises:
      ValueError: there is no such slot, or the adapter does not fit the bank.
      TypeError: `adapter_id` is not an integer.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> bank = lora_jax.serving.bank([lora_jax.wrap(params, "kernel", rank=2)], capacity=3)
      >>> other = lora_jax.wrap(params, "kernel", rank=1)
      >>> lora_jax.serving.ids(lora_jax.serving.replace(bank, other, adapter_id=2))
      (0, 2)
    """
    index = bank_index(bank)
    if not is_tracer(adapter_id):
        _check_slot(index, checked_id(adapter_id))
    return _replaced(index, wrapped, adapter_id)


def remove(bank: Any, adapter_id: int) -> Any:
    """Returns the bank with a slot emptied; a traced id of that slot gives the base model.

    Args:
      bank: what `serving.bank([...], capacity=...)` returned.
      adapter_id: the slot.

    Returns:
      The bank, of the same shapes.

    Raises:
      ValueError: there is no such adapter.
      TypeError: `adapter_id` is not an integer.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> wrapped = lora_jax.wrap(params, "kernel", rank=2)
      >>> bank = lora_jax.serving.bank([wrapped, wrapped])
      >>> lora_jax.serving.ids(lora_jax.serving.remove(bank, 0))
      (1,)
    """
    index = bank_index(bank)
    slot = checked_id(adapter_id)
    _check_slot(index, slot)
    check_known(index, [slot])
    return index.mapped(
        lambda _, node: _with_slot(node, empty_numbers(without_bank(slot_of(node, slot))), slot)
    )


def _replaced(index: NodeIndex, wrapped: Any, slot: int | Array) -> Any:
    adapter = NodeIndex.of(wrapped)
    check_adapter("`wrapped`", adapter)
    check_same_model("`wrapped`", adapter, "`bank`", index)
    weights = adapter.weights
    return index.mapped(
        lambda path, node: _with_slot(node, _fitting(path, weights[path], node), slot)
    )


def _fitting(path: str, node: LoRAWeight, bank: LoRABank) -> dict[str, Any]:
    """Returns the arrays of an adapter in the shapes and dtypes of the bank's slots."""
    node = on_original(node)
    if node.rank > bank.rank:
        raise ValueError(
            f"`wrapped` has the rank {node.rank} at '{path}', and `bank` has room for "
            f"{bank.rank}; expected at most that. serving.bank([...], rank={node.rank}) "
            f"makes a bank with room for it, and arithmetic.resize(wrapped, {bank.rank}) the best "
            "approximation of it."
        )
    if common_layers([node, bank]) != bank.layers:
        raise ValueError(
            f"`wrapped` adapts the layers {node.layers or 'all'} at '{path}', and `bank` has "
            f"room for {bank.layers}; expected some of them. Give both to serving.bank([...])."
        )
    node = dataclasses.replace(node, base=bank.base)
    node = with_rank(spread(node, bank.layers), bank.rank)
    numbers = {name: array for name, array in numbers_of(node).items() if name in slot_arrays(bank)}
    for name, array in numbers.items():
        dtype = getattr(bank, name).dtype
        if common_dtype(array.dtype, dtype) != dtype:
            raise ValueError(
                f"`wrapped` has the dtype {array.dtype} at '{path}/{name}', and `bank` {dtype}, "
                "which does not hold it; give both to serving.bank([...])."
            )
    return numbers


def _with_slot(bank: LoRABank, numbers: Mapping[str, Any], slot: int | Array) -> LoRABank:
    """Returns a weight's bank with the contents of one slot replaced."""
    index = jnp.asarray(slot, jnp.int32)
    written: dict[str, Any] = {
        name: _written(array, numbers[name], index) for name, array in slot_arrays(bank).items()
    }
    return dataclasses.replace(bank, **written)


@jax.jit
def _written(bank: Array, array: Array, index: Array) -> Array:
    row = array.astype(bank.dtype)
    return bank.at[index].set(row, mode="drop", wrap_negative_indices=False)


def _check_slot(index: NodeIndex, slot: int) -> None:
    capacity = capacity_of(index)
    if not 0 <= slot < capacity:
        raise ValueError(
            f"`adapter_id` is {slot}; expected a slot of `bank`, from 0 to {capacity - 1}. "
            "serving.bank([...], capacity=...) makes a larger bank."
        )
