"""Bringing adapters of one model into one form, in which only their numbers differ."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax._compat import is_tracer
from lora_jax._dtypes import common_dtype, epsilon
from lora_jax._finite import not_finite
from lora_jax._nodes import NodeIndex
from lora_jax._norms import squared_norms
from lora_jax._originals import original, original_array
from lora_jax._paths import listed
from lora_jax._row_selection import selects_rows
from lora_jax._shapes import (
    Layers,
    factor_places,
    magnitude_places,
    sizes,
    spread_layers,
)
from lora_jax._values import as_array
from lora_jax._weight import FullWeight, LoRABank, LoRAWeight, has_factors, is_lora_weight
from lora_jax.quantization._weight import is_quantized

Adapted = LoRAWeight | LoRABank

# The fields in which two adapters of one weight may differ.
NUMBERS = ("lora_A", "lora_B", "scale", "magnitude")


def checked_adapters(adapters: Any) -> list[NodeIndex]:
    """Returns the indices of wrapped trees, after checking that they share a model."""
    if not isinstance(adapters, list | tuple) or not adapters:
        raise TypeError(
            f"`adapters` is a {type(adapters).__name__}; expected a list of at least one tree that "
            "wrap(params, targets) returned."
        )
    indices = [NodeIndex.of(tree) for tree in adapters]
    for number, index in enumerate(indices):
        check_adapter(f"`adapters[{number}]`", index)
        check_same_model(f"`adapters[{number}]`", index, "`adapters[0]`", indices[0])
    return indices


def check_adapter(name: str, index: NodeIndex) -> None:
    """Raises unless a tree has one finite low-rank adapter for each of its targets."""
    index.check_single()
    if not index.weights:
        raise ValueError(f"{name} has no adapters; expected what wrap(params, targets) returned.")
    of_rows = [path for path, node in index.weights.items() if selects_rows(node)]
    if of_rows:
        raise ValueError(
            f"{name} adapts single rows of {listed(of_rows)}; expected low-rank adapters, which "
            "differ in numbers alone. merge(wrapped, targets=...) puts the rows into the weight, "
            "which all adapters then share."
        )
    found = not_finite(
        (f"{path}/{each}", getattr(node, each))
        for path, node in index.weights.items()
        for each in NUMBERS
        if getattr(node, each) is not None
    )
    if found:
        raise ValueError(
            f"{name} holds values that are not finite at {listed(found)}; expected an adapter that "
            "was trained to finite values, such as an earlier checkpoint of it."
        )


def check_same_model(name: str, index: NodeIndex, other_name: str, other: NodeIndex) -> None:
    """Raises unless two trees adapt the same weights of the same model in the same way."""
    if index.structure != other.structure:
        raise ValueError(
            f"{name} has a different structure from {other_name}; expected adapters of the "
            f"same model.\n{name}: {index.structure}\n{other_name}: {other.structure}"
        )
    for (path, leaf), other_leaf in zip(index.tree.items(), other.tree.leaves, strict=True):
        _check_same_leaf((name, other_name), path, leaf, other_leaf)


def _check_same_leaf(names: tuple[str, str], path: str, leaf: Any, other: Any) -> None:
    for name, each in zip(names, (leaf, other), strict=True):
        if isinstance(each, FullWeight):
            raise ValueError(
                f"{name} trains '{path}' in full; expected adapters only, which share their base. "
                "Wrap without `train`, or arithmetic.extract(params, tuned, targets, rank=...) "
                "makes an adapter of it."
            )
    if has_factors(leaf) != has_factors(other):
        with_adapter, without = names if has_factors(leaf) else names[::-1]
        raise ValueError(
            f"{with_adapter} has an adapter at '{path}', and {without} has none; expected the same "
            "targets. Wrap both with all targets: an adapter that is not trained changes nothing."
        )
    if not has_factors(leaf):
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
            "expected adapters of one kind. Make one bank of each kind."
        )
    if not _is_same_base(leaf, other):
        raise ValueError(_other_base(names, path))


def _other_base(names: tuple[str, str], path: str) -> str:
    return (
        f"{names[0]} has another base than {names[1]} at '{path}'; expected adapters of the same "
        "weights, such as restore(path, params) with the same `params`."
    )


def _is_same_base(node: Adapted, other: Adapted) -> bool:
    if not _moves_weight(node) and not _moves_weight(other):
        return _is_same_leaf(node.base, other.base)
    if node.base is other.base and _initial_A(node) is _initial_A(other):
        return True
    if (node.shape, node.dtype) != (other.shape, other.dtype):
        return False
    if any(map(is_tracer, jax.tree.leaves((node, other)))):
        return True
    # A part that an initialiser moved out of the weight is restored only to rounding.
    with jax.ensure_compile_time_eval():
        wide = common_dtype(node.dtype, jnp.float32)
        left, right = (original_array(each).astype(wide) for each in (node, other))
        if is_quantized(node.base) or is_quantized(other.base):
            rounding = [
                jnp.linalg.norm(as_array(original(each)).astype(wide) - array)
                for each, array in ((node, left), (other, right))
            ]
            return bool(jnp.linalg.norm(left - right) <= 2 * sum(rounding))
        bases = [as_array(each.base) for each in (node, other)]
        largest = sum(jnp.max(jnp.abs(base.astype(wide))) for base in bases)
        largest += jnp.max(jnp.abs(left))
        return bool(jnp.max(jnp.abs(left - right)) <= 4 * epsilon(node.dtype) * largest)


def _moves_weight(node: Adapted) -> bool:
    """Says whether an initialiser moved a part of the weight into the factors."""
    return _initial_A(node) is not None


def _initial_A(node: Adapted) -> Any:
    return node.initial_A if is_lora_weight(node) else None


def _is_same_leaf(leaf: Any, other: Any) -> bool:
    """Says whether two leaves are equal, by identity first; traced ones are assumed to be."""
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


def map_together(
    function: Callable[[str, list[LoRAWeight]], Any], indices: Sequence[NodeIndex]
) -> Any:
    """Returns the first tree with `function(path, nodes)` at each weight that all trees adapt."""
    weights = [index.weights for index in indices]
    return indices[0].mapped(lambda path, _: function(path, [each[path] for each in weights]))


def check_no_magnitude(name: str, path: str, node: Adapted) -> None:
    """Raises if a weight has a magnitude (DoRA): a sum of such weights is not an adapter."""
    if node.magnitude is not None:
        raise ValueError(
            f"{name} has a magnitude (DoRA) at '{path}', which multiplies the weight, so such "
            "adapters can't be added; expected plain LoRA. arithmetic.extract(params, "
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


def common_layers(nodes: Sequence[Adapted]) -> Layers | None:
    """Returns the layers that at least one of the nodes adapts; None for all of them."""
    if any(node.layers is None for node in nodes):
        return None
    layers = tuple(sorted({layer for node in nodes for layer in node.layers or ()}))
    return None if len(layers) == _layer_count(nodes[0]) else layers


def spread(node: LoRAWeight, layers: Layers | None) -> LoRAWeight:
    """Returns the same weight extended to more layers, which it leaves unchanged."""
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
        wider,
        magnitude=magnitude.at[index].set(node.magnitude),
        squared_norm=None if node.squared_norm is None else squared,
    )


def with_rank(node: LoRAWeight, rank: int) -> LoRAWeight:
    """Returns the same weight with factors of a larger rank, padded with zeros."""
    added = rank - node.rank
    if added == 0:
        return node
    rank_axis = node.axes.count("batch")
    return dataclasses.replace(
        node,
        lora_A=_padded(node.lora_A, node.lora_A.ndim - 1, added),
        lora_B=_padded(node.lora_B, rank_axis, added),
    )


def _layer_count(node: Adapted) -> int:
    return sizes(node.shape, node.axes, "batch")[0]


def _padded(array: Array, axis: int, added: int) -> Array:
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, added)
    return jnp.pad(array, padding)
