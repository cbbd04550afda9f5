"""Changing which adapters a stack of fixed capacity holds, without changing a shape."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._algebra import on_original, with_norm
from lora_jax._compat import is_tracer
from lora_jax._dtypes import common_dtype
from lora_jax._weight import LoRAWeight
from lora_jax.serving._alike import (
    check_adapter,
    check_same_model,
    common_layers,
    map_lora_weights,
    map_together,
    numbers_of,
    spread,
    with_rank,
    without_change,
)
from lora_jax.serving._stack import (
    adapter_ids,
    capacity_of,
    check_known,
    check_stacked,
    checked_id,
)


def add_adapter(stacked: Any, wrapped: Any) -> tuple[Any, int]:
    """Returns the bank with one more adapter, and the id that it got: the first free one.

    Args:
      stacked: what `stack([...], capacity=...)` returned.
      wrapped: an adapter of the same params and targets, of at most the bank's rank.

    Returns:
      stacked: the bank, of the same shapes.
      adapter_id: the adapter's place.

    Raises:
      ValueError: the bank is full, or the adapter does not fit it.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> wrapped = lora_jax.wrap(params, "kernel", rank=2)
      >>> bank = lora_jax.stack([wrapped], capacity=3)
      >>> bank, adapter_id = lora_jax.add_adapter(bank, wrapped)
      >>> adapter_id
      1
    """
    taken = set(adapter_ids(stacked))
    capacity = capacity_of(stacked)
    free = next((place for place in range(capacity) if place not in taken), None)
    if free is None:
        raise ValueError(
            f"`stacked` is full: all of its {capacity} places hold adapters. "
            "remove_adapter(stacked, id) frees one, and stack([...], capacity=...) makes a larger "
            "bank."
        )
    return replace_adapter(stacked, wrapped, adapter_id=free), free


def replace_adapter(stacked: Any, wrapped: Any, *, adapter_id: int | Array) -> Any:
    """Returns the bank with an adapter in place of whatever a place held.

    Args:
      stacked: what `stack([...], capacity=...)` returned.
      wrapped: an adapter of the same params and targets, of at most the bank's rank.
      adapter_id: the place, from 0 to below the capacity. Under `jax.jit` it may be traced, which
        with the bank donated overwrites it where it is; one out of range then changes nothing.

    Returns:
      The bank, of the same shapes.

    Raises:
      ValueError: there is no such place, or the adapter does not fit the bank.
      TypeError: `adapter_id` is not an integer.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> bank = lora_jax.stack([lora_jax.wrap(params, "kernel", rank=2)], capacity=3)
      >>> other = lora_jax.wrap(params, "kernel", rank=1)
      >>> lora_jax.adapter_ids(lora_jax.replace_adapter(bank, other, adapter_id=2))
      (0, 2)
    """
    check_stacked(stacked)
    if not is_tracer(adapter_id):
        _check_place(stacked, checked_id(adapter_id))
    check_adapter("`wrapped`", wrapped)
    check_same_model("`wrapped`", wrapped, "`stacked`", stacked)

    def replaced(path: str, nodes: list[LoRAWeight]) -> LoRAWeight:
        bank, node = nodes
        return _with(bank, _fitting(path, node, bank), adapter_id)

    return map_together(replaced, [stacked, wrapped])


def remove_adapter(stacked: Any, adapter_id: int) -> Any:
    """Returns the bank with a place emptied; whoever still asks for it gets the base model.

    Args:
      stacked: what `stack([...], capacity=...)` returned.
      adapter_id: the place.

    Returns:
      The bank, of the same shapes.

    Raises:
      ValueError: there is no such adapter.
      TypeError: `adapter_id` is not an integer.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> wrapped = lora_jax.wrap(params, "kernel", rank=2)
      >>> bank = lora_jax.stack([wrapped, wrapped])
      >>> lora_jax.adapter_ids(lora_jax.remove_adapter(bank, 0))
      (1,)
    """
    check_stacked(stacked)
    place = checked_id(adapter_id)
    _check_place(stacked, place)
    check_known(stacked, [place])

    def removed(node: LoRAWeight) -> LoRAWeight:
        first = {name: array[0] for name, array in numbers_of(node).items()}
        single = dataclasses.replace(node, **first)
        return _with(node, dataclasses.replace(single, **without_change(single)), place)

    return map_lora_weights(removed, stacked)


def _fitting(path: str, node: LoRAWeight, bank: LoRAWeight) -> LoRAWeight:
    """Returns the weight with the shapes and dtypes that the bank has room for."""
    node = on_original(node)
    if node.rank > bank.rank:
        raise ValueError(
            f"`wrapped` has the rank {node.rank} at '{path}', and `stacked` has room for "
            f"{bank.rank}; expected at most that. stack([...], rank={node.rank}) makes a bank with "
            f"room for it, and resize(wrapped, {bank.rank}) the best approximation of it."
        )
    if common_layers([node, bank]) != bank.layers:
        raise ValueError(
            f"`wrapped` adapts the layers {node.layers or 'all'} at '{path}', and `stacked` has "
            f"room for {bank.layers}; expected some of them. Give both to stack([...])."
        )
    node = dataclasses.replace(node, base=bank.base)
    node = with_rank(spread(node, bank.layers), bank.rank)
    if bank.norm is not None:
        node = with_norm(node)
    for name, array in numbers_of(node).items():
        dtype = getattr(bank, name).dtype
        if common_dtype(array.dtype, dtype) != dtype:
            raise ValueError(
                f"`wrapped` has the dtype {array.dtype} at '{path}/{name}', and `stacked` {dtype}, "
                "which does not hold it; give both to stack([...])."
            )
    return node


def _with(bank: LoRAWeight, node: LoRAWeight, place: int | Array) -> LoRAWeight:
    """Returns the stacked weight with other numbers in one place."""
    index = jnp.asarray(place, jnp.int32)
    numbers = {
        name: _written(getattr(bank, name), array, index)
        for name, array in numbers_of(node).items()
    }
    return dataclasses.replace(bank, **numbers)


@jax.jit
def _written(stacked: Array, array: Array, index: Array) -> Array:
    row = array.astype(stacked.dtype)
    return stacked.at[index].set(row, mode="drop", wrap_negative_indices=False)


def _check_place(stacked: Any, place: int) -> None:
    capacity = capacity_of(stacked)
    if not 0 <= place < capacity:
        raise ValueError(
            f"`adapter_id` is {place}; expected a place from 0 to {capacity - 1}, of which "
            "`stacked` has that many. stack([...], capacity=...) makes a larger bank."
        )
