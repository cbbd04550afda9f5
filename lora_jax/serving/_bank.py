"""Banks: making one from several adapters of a model, and selecting an adapter from it."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from lora_jax._compat import is_tracer
from lora_jax._nodes import NodeIndex
from lora_jax._originals import on_original
from lora_jax._settings import checked_rank
from lora_jax._weight import LoRABank, LoRAWeight
from lora_jax.arithmetic._alike import (
    checked_adapters,
    common_layers,
    map_together,
    spread,
    with_rank,
)
from lora_jax.serving._slots import bank_of, slot_of, without_bank


def bank(adapters: Sequence[Any], *, capacity: int | None = None, rank: int | None = None) -> Any:
    r"""Returns a bank: one tree with several adapters that share a base.

    Each weight is a `LoRABank`, whose `lora_A`, `lora_B`, `scale` and `magnitude` have an axis of
    slots in front. Smaller ranks are padded with zeros and every scale is kept, so adapter i is
    still $W + s_i A_i B_i$. If an initialiser moved a part of the weight into the factors, it is
    moved back first, as by `arithmetic.on_original_base`, which doubles that adapter's rank. If the
    adapters cover different layers, each is extended to their union; on the added layers it changes
    nothing.

    `add`, `replace` and `remove` change the contents of slots but no shapes, so compiled functions
    of the bank stay valid. To train one adapter further, `select` it; to train all of them in
    place, `split` the bank.

    Args:
      adapters: wrapped trees of the same params with the same targets.
      capacity: the number of slots; by default the number of adapters.
      rank: the rank of the slots, in every weight; by default the largest rank of the adapters,
        weight by weight.

    Returns:
      The bank, for `serving.adapt`, `select` and `activate`.

    Raises:
      ValueError: the adapters differ in base, structure, targets, axes or kind, one of them is of
        single rows, trains weights in full or holds values that are not finite, or `capacity` or
        `rank` is too small.
      TypeError: `adapters` is not a list, or `capacity` or `rank` is not an integer.

    Source: Sheng et al., S-LoRA: Serving Thousands of Concurrent LoRA Adapters, 2023.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> adapters = [lora_jax.wrap(params, "kernel", rank=rank) for rank in (1, 2)]
      >>> bank = lora_jax.serving.bank(adapters, capacity=8)
      >>> bank["kernel"].lora_A.shape, bank["kernel"].lora_B.shape
      ((8, 4, 2), (8, 2, 3))
    """
    indices = checked_adapters(adapters)
    slots = _checked_capacity(capacity, len(indices))
    if rank is not None:
        rank = checked_rank("`rank`", rank)
    return map_together(lambda path, nodes: _bank_of(path, nodes, slots, rank), indices)


def select(bank: Any, adapter_id: int | Array) -> Any:
    """Returns one adapter of a bank, as an ordinary wrapped tree of the bank's rank.

    Args:
      bank: what `serving.bank` returned.
      adapter_id: its id; -1 gives an adapter that changes nothing, and so does an unknown id that
        is traced.

    Returns:
      The wrapped tree.

    Raises:
      ValueError: there is no such adapter.
      TypeError: `adapter_id` is not an integer.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> bank = lora_jax.serving.bank([lora_jax.wrap(params, "kernel", rank=2)])
      >>> lora_jax.serving.select(bank, 0)["kernel"].rank
      2
    """
    index = bank_index(bank)
    if not is_tracer(adapter_id):
        check_known(index, [checked_id(adapter_id)])
    return index.mapped(lambda _, node: without_bank(slot_of(node, adapter_id)))


def ids(bank: Any) -> tuple[int, ...]:
    """Returns the ids of the slots that hold an adapter; the others compute the base model.

    A slot is empty if all its factors and scales are zero.

    Args:
      bank: what `serving.bank` returned.

    Returns:
      The ids, in order.

    Raises:
      ValueError: `bank` is not a bank of adapters, or is traced.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> wrapped = lora_jax.wrap(params, "kernel", rank=2)
      >>> lora_jax.serving.ids(lora_jax.serving.bank([wrapped, wrapped], capacity=5))
      (0, 1)
    """
    return occupied_slots(bank_index(bank))


def bank_index(bank: Any) -> NodeIndex:
    """Returns the index of a bank; raises unless `bank` is what `serving.bank` returned."""
    index = NodeIndex.of(bank)
    if not index.banks or len(index.banks) < len(index.nodes):
        raise ValueError(
            "`bank` is not a bank of adapters; expected what serving.bank([wrapped, ...]) returned."
        )
    return index


def capacity_of(index: NodeIndex) -> int:
    """Returns how many slots a bank has."""
    return next(iter(index.banks.values())).capacity


def occupied_slots(index: NodeIndex) -> tuple[int, ...]:
    """Returns the slots of a bank that hold an adapter."""
    numbers = _occupying(index)
    if any(map(is_tracer, jax.tree.leaves(numbers))):
        raise ValueError(
            "`bank` is traced, so its slots can't be inspected; call this outside of "
            "jax.jit, or serving.replace(bank, wrapped, adapter_id=...) with an id."
        )
    with jax.ensure_compile_time_eval():
        return tuple(np.flatnonzero(_occupied(numbers)).tolist())


def checked_id(adapter_id: Any) -> int:
    """Returns an id as an int."""
    if isinstance(adapter_id, bool) or not hasattr(adapter_id, "__index__"):
        raise TypeError(f"`adapter_id` is {adapter_id!r}; expected a whole number.")
    return operator.index(adapter_id)


def check_known(index: NodeIndex, wanted: Sequence[int]) -> None:
    """Raises if one of the ids in `wanted` is neither -1 nor the id of an adapter."""
    if any(map(is_tracer, jax.tree.leaves(_occupying(index)))):
        known: Sequence[int] = range(capacity_of(index))
    else:
        known = occupied_slots(index)
    unknown = sorted(set(wanted) - {-1, *known})
    if unknown:
        raise ValueError(
            f"There is no adapter with the id {', '.join(map(str, unknown))}; expected one of "
            f"{', '.join(map(str, known)) or 'none'}, or -1 for the base model. "
            "serving.ids(bank) lists them."
        )


def _bank_of(path: str, nodes: Sequence[LoRAWeight], capacity: int, rank: int | None) -> LoRABank:
    untouched = next((node for node in nodes if node.initial_A is None), nodes[0])
    nodes = [on_original(node) for node in nodes]
    largest = max(node.rank for node in nodes)
    if rank is not None and largest > rank:
        raise ValueError(
            f"`rank` is {rank}, and an adapter has the rank {largest} at '{path}'; expected at "
            f"least that: serving.bank(..., rank={largest})."
        )
    layers = common_layers(nodes)
    base = on_original(untouched).base
    alike = [
        with_rank(spread(dataclasses.replace(node, base=base), layers), rank or largest)
        for node in nodes
    ]
    return bank_of(alike, capacity)


def _occupying(index: NodeIndex) -> list[list[Any]]:
    """Returns the arrays of each weight, of which one is nonzero in every occupied slot."""
    return [[node.lora_A, node.lora_B, node.scale] for node in index.banks.values()]


@jax.jit
def _occupied(numbers: Sequence[Sequence[Array]]) -> Bool[Array, " capacity"]:
    holds = [
        jnp.any(array != 0, axis=range(1, array.ndim)) for arrays in numbers for array in arrays
    ]
    return jnp.any(jnp.stack(holds), axis=0)


def _checked_capacity(capacity: Any, count: int) -> int:
    if capacity is None:
        return count
    if isinstance(capacity, bool) or not hasattr(capacity, "__index__"):
        raise TypeError(f"`capacity` is {capacity!r}; expected a whole number.")
    if operator.index(capacity) < count:
        raise ValueError(
            f"`capacity` is {capacity}, and there are {count} adapters; expected at least as many."
        )
    return operator.index(capacity)
