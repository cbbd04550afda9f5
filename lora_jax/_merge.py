"""Folding adapters into the weights, and taking them out again."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

from lora_jax._algebra import dense, without_change
from lora_jax._compat import is_tracer
from lora_jax._finite import not_finite
from lora_jax._paths import leaves_with_paths, listed, map_with_paths
from lora_jax._shapes import AnyArray, factor_shapes, layers_shape
from lora_jax._targets import Targets, check_no_overrides, select
from lora_jax._weight import (
    FullWeight,
    LoRAWeight,
    check_single,
    is_adapter_node,
    is_lora_weight,
)


def merge(wrapped: Any, *, targets: Targets | None = None, safe: bool = False) -> Any:
    r"""Returns plain params with $W + s \cdot A B$ in place of each adapted weight.

    The sum is taken in at least float32, in the widest of the dtypes, and cast once, so that
    structure, shapes and dtypes are those of the tree that was wrapped.

    Args:
      wrapped: what `wrap` returned, trained or not.
      targets: which of the adapted weights to merge, in the forms of `wrap`; all unless given. The
        others stay what they are.
      safe: whether to look at every merged value, and to raise if one is not finite.

    Returns:
      Plain params, the original structure; with `targets`, a wrapped tree of the other adapters.

    Raises:
      ValueError: `targets` matches no adapted weight; `wrapped` is a stack of adapters; or, with
        `safe`, a merged value is not finite.

    Source: Hu et al. 2021, section 4.1, "No additional inference latency".

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> lora_jax.merge(wrapped)["kernel"].shape
      (4, 3)
    """
    chosen = _chosen_paths(wrapped, wrapped, targets)
    values: list[tuple[str, Any]] = []

    def merged(path: str, leaf: Any) -> Any:
        if not is_adapter_node(leaf) or path not in chosen:
            return leaf
        values.append((path, _merged(path, leaf)))
        return values[-1][1]

    params = map_with_paths(merged, wrapped, is_leaf=is_adapter_node)
    if safe:
        _check_finite(values)
    return params


def unmerge(merged: Any, wrapped: Any, *, targets: Targets | None = None) -> Any:
    r"""Returns the wrapped tree whose adapters were folded into `merged`.

    Each base is $W' - s \cdot A B$, taken in at least float32 and cast once: the original to
    rounding, which for a half-precision weight is that of half precision. `unwrap(wrapped)` gives
    the original exactly where `wrapped` still holds it.

    Args:
      merged: what `merge(wrapped)` returned.
      wrapped: the adapters that were merged. Their bases are not read, and may be None.
      targets: which of the adapters to take out, in the forms of `wrap`; all unless given. What was
        not merged is kept.

    Returns:
      A wrapped tree with the same adapters.

    Raises:
      ValueError: the trees or the shapes differ, `targets` matches no adapter, or an adapter has a
        magnitude (DoRA), which leaves nothing of the weight's own norm.

    Source: Hu et al. 2021, section 4.1, on switching tasks by subtracting $B A$.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> lora_jax.unmerge(lora_jax.merge(wrapped), wrapped)["kernel"].base.shape
      (4, 3)
    """
    _check_same_structure(merged, wrapped)
    chosen = _chosen_paths(merged, wrapped, targets)
    nodes = iter(jax.tree.leaves(wrapped, is_leaf=is_adapter_node))

    def unmerged(path: str, leaf: Any) -> Any:
        node = next(nodes)
        if path not in chosen or is_adapter_node(leaf) or not is_adapter_node(node):
            return leaf
        return _unmerged(path, leaf, node)

    return map_with_paths(unmerged, merged, is_leaf=is_adapter_node)


def _merged(path: str, node: LoRAWeight | FullWeight) -> AnyArray:
    if isinstance(node, FullWeight):
        return node.value
    check_single(path, node)
    return dense(node)


def _unmerged(path: str, leaf: Array, node: LoRAWeight | FullWeight) -> LoRAWeight | FullWeight:
    if isinstance(node, FullWeight):
        return dataclasses.replace(node, value=leaf)
    check_single(path, node)
    if node.magnitude is not None:
        raise ValueError(
            f"'{path}' has a magnitude (DoRA), and what is merged has nothing of the weight's own "
            "norm; keep `wrapped`, of which unwrap(wrapped) gives the original exactly."
        )
    if not _fits(leaf, node):
        raise ValueError(
            f"`merged` has the shape {leaf.shape} at '{path}', which does not fit the factors of "
            f"its adapter, {node.lora_A.shape} and {node.lora_B.shape}, with the axes {node.axes}; "
            "expected what merge(wrapped) returned."
        )
    return dataclasses.replace(node, base=without_change(leaf, node))


def _fits(leaf: Array, node: LoRAWeight) -> bool:
    if leaf.ndim != len(node.axes):
        return False
    shapes = factor_shapes(layers_shape(leaf.shape, node.axes, node.layers), node.axes, node.rank)
    return (node.lora_A.shape, node.lora_B.shape) == shapes


def _chosen_paths(tree: Any, wrapped: Any, targets: Targets | None) -> set[str]:
    """Returns the paths of the nodes of `wrapped` that `targets` selects, with `tree`'s shapes."""
    leaves = leaves_with_paths(wrapped, is_leaf=is_adapter_node)
    paths = {path for path, leaf in leaves if is_adapter_node(leaf)}
    if targets is None:
        return paths
    shapes = jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_adapter_node(leaf) else leaf
        ),
        tree,
        is_leaf=is_adapter_node,
    )
    selected = select(
        shapes,
        targets,
        obstacle=lambda path, leaf, named: None if path in paths else "it is not adapted",
        expected="an adapted weight",
    )
    check_no_overrides(selected, "targets", "what is merged")
    return set(selected)


def _check_finite(merged: Sequence[tuple[str, Array]]) -> None:
    if any(is_tracer(array) for _, array in merged):
        raise ValueError(
            "`safe` is True, but the values are traced and can't be looked at; call "
            "merge(wrapped, safe=True) outside of jax.jit."
        )
    found = not_finite(merged)
    if found:
        raise ValueError(
            f"`wrapped` merges to values that are not finite at {listed(found)}; nothing is "
            "returned. summary(wrapped) shows scales and dtypes; a wider dtype of the weight or "
            "an earlier checkpoint may be finite."
        )


def _check_same_structure(merged: Any, wrapped: Any) -> None:
    structure: Any = jax.tree.structure(merged, is_leaf=is_adapter_node)
    expected: Any = jax.tree.structure(wrapped, is_leaf=is_adapter_node)
    if structure != expected:
        raise ValueError(
            "`merged` has another structure than `wrapped`; expected what merge(wrapped) "
            f"returned.\n`merged`: {structure}\n`wrapped`: {expected}"
        )
    if not any(map(is_lora_weight, jax.tree.leaves(wrapped, is_leaf=is_adapter_node))):
        raise ValueError("`wrapped` has no adapters; expected what wrap(params, targets) returned.")
