"""Adapters of one model, brought into one form, in which they differ in numbers only."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax._algebra import on_original, squared_norms
from lora_jax._compat import is_tracer
from lora_jax._dtypes import common_dtype, epsilon
from lora_jax._finite import not_finite
from lora_jax._paths import leaves_with_paths, listed
from lora_jax._shapes import (
    Layers,
    factor_places,
    magnitude_places,
    sizes,
    spread_layers,
)
from lora_jax._weight import FullWeight, LoRAWeight, check_single, is_adapter_node, is_lora_weight

NUMBERS = ("lora_A", "lora_B", "scale", "magnitude", "norm")


def checked_adapters(adapters: Any) -> list[Any]:
    """Returns a sequence of wrapped trees as a list, having checked that they are of one model."""
    if not isinstance(adapters, list | tuple) or not adapters:
        raise TypeError(
            f"`adapters` is a {type(adapters).__name__}; expected a list of at least one tree that "
            "wrap(params, targets) returned."
        )
    for number, tree in enumerate(adapters):
        check_adapter(f"`adapters[{number}]`", tree)
        check_same_model(f"`adapters[{number}]`", tree, "`adapters[0]`", adapters[0])
    return list(adapters)


def check_adapter(name: str, wrapped: Any) -> None:
    """Raises unless `wrapped` is a tree with one finite adapter for each of its targets."""
    nodes = lora_nodes(wrapped)
    if not nodes:
        raise ValueError(f"{name} has no adapters; expected what wrap(params, targets) returned.")
    for path, node in nodes:
        check_single(path, node)
    found = not_finite(
        (f"{path}/{each}", getattr(node, each))
        for path, node in nodes
        for each in NUMBERS
        if getattr(node, each) is not None
    )
    if found:
        raise ValueError(
            f"{name} holds values that are not finite at {listed(found)}; expected an adapter that "
            "was trained to finite values, such as an earlier checkpoint of it."
        )


def check_same_model(name: str, wrapped: Any, other_name: str, other: Any) -> None:
    """Raises unless two trees adapt the same weights of the same model in the same way."""
    structures: list[Any] = [
        jax.tree.structure(tree, is_leaf=is_adapter_node) for tree in (wrapped, other)
    ]
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name} has another structure than {other_name}; expected adapters of the same "
            f"model.\n{name}: {structures[0]}\n{other_name}: {structures[1]}"
        )
    pairs = zip(
        leaves_with_paths(wrapped, is_leaf=is_adapter_node),
        jax.tree.leaves(other, is_leaf=is_adapter_node),
        strict=True,
    )
    for (path, leaf), other_leaf in pairs:
        _check_same_leaf((name, other_name), path, leaf, other_leaf)


def _check_same_leaf(names: tuple[str, str], path: str, leaf: Any, other: Any) -> None:
    for name, each in zip(names, (leaf, other), strict=True):
        if isinstance(each, FullWeight):
            raise ValueError(
                f"{name} trains '{path}' in full; expected adapters only, which share their base. "
                "Wrap without `train`, or arithmetic.extract(params, tuned, targets, rank=...) "
                "makes an adapter of it."
            )
    if is_lora_weight(leaf) != is_lora_weight(other):
        with_adapter, without = names if is_lora_weight(leaf) else names[::-1]
        raise ValueError(
            f"{with_adapter} has an adapter at '{path}', and {without} has none; expected the same "
            "targets. Wrap both with the targets of either: what is not trained changes nothing."
        )
    if not is_lora_weight(leaf):
        if not _is_same_leaf(leaf, other):
            raise ValueError(_other_base(names, path))
        return
    if leaf.axes != other.axes:
        raise ValueError(
            f"{names[0]} has the axes {leaf.axes} at '{path}', and {names[1]} {other.axes}; "
            "expected adapters that were wrapped with the same `axes`."
        )
    if (leaf.magnitude is None) != (other.magnitude is None):
        with_magnitude, without = names if leaf.magnitude is not None else names[::-1]
        raise ValueError(
            f"{with_magnitude} has a magnitude (DoRA) at '{path}', and {without} has none; "
            "expected adapters of one kind. Stack those with and those without by themselves."
        )
    if not _is_same_base(leaf, other):
        raise ValueError(_other_base(names, path))


def _other_base(names: tuple[str, str], path: str) -> str:
    return (
        f"{names[0]} has another base than {names[1]} at '{path}'; expected adapters of the same "
        "weights, such as restore(path, params) with the same `params`."
    )


def _is_same_base(node: LoRAWeight, other: LoRAWeight) -> bool:
    if node.initial_A is None and other.initial_A is None:
        return _is_same_leaf(node.base, other.base)
    if node.base is other.base and node.initial_A is other.initial_A:
        return True
    if (node.shape, node.dtype) != (other.shape, other.dtype):
        return False
    if any(map(is_tracer, jax.tree.leaves((node, other)))):
        return True
    # What an initialiser took out of the weight comes back to rounding.
    with jax.ensure_compile_time_eval():
        wide = common_dtype(node.dtype, jnp.float32)
        left, right = (on_original(each).base.astype(wide) for each in (node, other))
        largest = sum(jnp.max(jnp.abs(each.base.astype(wide))) for each in (node, other))
        largest += jnp.max(jnp.abs(left))
        return bool(jnp.max(jnp.abs(left - right)) <= 4 * epsilon(node.dtype) * largest)


def _is_same_leaf(leaf: Any, other: Any) -> bool:
    """Says whether two leaves are one, by identity first; numbers that are traced may be equal."""
    if leaf is other:
        return True
    leaves, others = jax.tree.leaves(leaf), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(map(_is_equal, leaves, others))


def _is_equal(leaf: Any, other: Any) -> bool:
    if leaf is other:
        return True
    if not (hasattr(leaf, "dtype") and hasattr(other, "dtype")):
        return bool(leaf == other)
    if (leaf.shape, leaf.dtype) != (other.shape, other.dtype):
        return False
    if is_tracer(leaf) or is_tracer(other):
        return True
    has_nan = jnp.issubdtype(leaf.dtype, jnp.inexact)
    with jax.ensure_compile_time_eval():
        return bool(jnp.array_equal(leaf, other, equal_nan=has_nan))


def lora_nodes(wrapped: Any) -> list[tuple[str, LoRAWeight]]:
    """Returns the adapted weights beside their paths."""
    return [
        (path, node)
        for path, node in leaves_with_paths(wrapped, is_leaf=is_adapter_node)
        if is_lora_weight(node)
    ]


def map_together(function: Callable[[str, list[LoRAWeight]], Any], trees: Sequence[Any]) -> Any:
    """Returns the first tree with `function(path, nodes)` at each weight that all trees adapt."""
    nodes = zip(*(lora_nodes(tree) for tree in trees), strict=True)
    return map_lora_weights(lambda _: _of_pairs(function, next(nodes)), trees[0])


def map_lora_weights(function: Callable[[LoRAWeight], Any], tree: Any) -> Any:
    """Returns `tree` with `function` applied to each adapted weight; the rest is kept."""
    return jax.tree.map(
        lambda leaf: function(leaf) if is_lora_weight(leaf) else leaf, tree, is_leaf=is_lora_weight
    )


def _of_pairs(
    function: Callable[[str, list[LoRAWeight]], Any], pairs: Sequence[tuple[str, LoRAWeight]]
) -> Any:
    return function(pairs[0][0], [node for _, node in pairs])


def check_no_magnitude(name: str, path: str, node: LoRAWeight) -> None:
    """Raises if a weight is one of DoRA, a sum of which is not an adapter."""
    if node.magnitude is not None:
        raise ValueError(
            f"{name} has a magnitude (DoRA) at '{path}', which multiplies the weight, so that such "
            "adapters don't add up; expected plain LoRA. arithmetic.extract(params, "
            "merge(wrapped), targets, rank=...) makes plain adapters of them."
        )


def checked_weights(weights: Any, count: int) -> Array:
    """Returns `count` weights as a float array."""
    array = weights
    if not hasattr(weights, "dtype"):
        is_traced = any(map(is_tracer, jax.tree.leaves(weights)))
        array = (jnp if is_traced else np).asarray(weights, np.float32)
    if array.shape != (count,):
        raise ValueError(
            f"`weights` has the shape {array.shape}; expected a number for each of the {count} "
            "adapters."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(np.float32)
    if not is_tracer(array) and not np.all(np.isfinite(np.asarray(array, np.float64))):
        raise ValueError(f"`weights` is {weights}; expected finite numbers.")
    return jnp.asarray(array)


def common_layers(nodes: Sequence[LoRAWeight]) -> Layers | None:
    """Returns the layers that at least one of the nodes adapts; None for all of them."""
    if any(node.layers is None for node in nodes):
        return None
    layers = tuple(sorted({layer for node in nodes for layer in node.layers or ()}))
    return None if len(layers) == _layer_count(nodes[0]) else layers


def spread(node: LoRAWeight, layers: Layers | None) -> LoRAWeight:
    """Returns the same weight with places for more layers, at which it changes nothing."""
    if node.layers == layers or node.layers is None:
        return node
    among = tuple(range(_layer_count(node))) if layers is None else layers
    places = tuple(among.index(layer) for layer in node.layers)
    axis = node.axes.index("batch")
    A_places, B_places = factor_places(node.axes)
    lora_A, lora_B = (
        spread_layers(array, each[axis], places, len(among), 0)
        for array, each in ((node.lora_A, A_places), (node.lora_B, B_places))
    )
    wider = dataclasses.replace(node, lora_A=lora_A, lora_B=lora_B, layers=layers)
    if node.magnitude is None:
        return wider
    squared = squared_norms(node.base, node.axes, layers)
    held = magnitude_places(node.axes)[axis]
    assert held is not None
    magnitude = jnp.sqrt(squared).astype(node.magnitude.dtype)
    index = (slice(None),) * held + (jnp.array(places),)
    return dataclasses.replace(
        wider, magnitude=magnitude.at[index].set(node.magnitude), squared_norm=squared
    )


def with_rank(node: LoRAWeight, rank: int) -> LoRAWeight:
    """Returns the same weight with factors of a larger rank, filled up with zeros."""
    added = rank - node.rank
    if added == 0:
        return node
    rank_axis = node.axes.count("batch")
    return dataclasses.replace(
        node,
        lora_A=_padded(node.lora_A, node.lora_A.ndim - 1, added),
        lora_B=_padded(node.lora_B, rank_axis, added),
    )


def without_change(node: LoRAWeight) -> dict[str, Any]:
    """Returns the numbers of an adapter beside which the weight is the base, exactly.

    Its magnitude is its norm, so that what it multiplies by is 1.
    """
    numbers = {name: jnp.zeros_like(getattr(node, name)) for name in ("lora_A", "lora_B", "scale")}
    if node.magnitude is None:
        return numbers
    norm = jnp.sqrt(node.squared_norm)
    kept = {} if node.norm is None else {"norm": norm}
    return {**numbers, "magnitude": norm.astype(node.magnitude.dtype), **kept}


def numbers_of(node: LoRAWeight) -> dict[str, Any]:
    """Returns what two adapters of one weight may differ in."""
    return {name: getattr(node, name) for name in NUMBERS if getattr(node, name) is not None}


def _layer_count(node: LoRAWeight) -> int:
    return sizes(node.shape, node.axes, "batch")[0]


def _padded(array: Array, axis: int, added: int) -> Array:
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, added)
    return jnp.pad(array, padding)
