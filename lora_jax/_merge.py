"""Merging adapters into the weights, and taking them out again."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, cast

import jax
from jaxtyping import Array

from lora_jax._compat import is_tracer
from lora_jax._finite import not_finite
from lora_jax._nodes import NodeIndex, check_single
from lora_jax._paths import listed
from lora_jax._requantize import (
    RequantizationWarning,
    errors_of,
    quantized_nodes,
    requantized_sum,
)
from lora_jax._shapes import AnyArray, factor_shapes, layers_shape
from lora_jax._targets import Targets, check_no_overrides, select
from lora_jax._values import dense, without_change
from lora_jax._weight import (
    AdapterNode,
    FullWeight,
    LoRAWeight,
    is_adapter_node,
    is_lora_weight,
)
from lora_jax.quantization._weight import is_quantized


def merge(
    wrapped: Any,
    *,
    targets: Targets | None = None,
    safe: bool = False,
    requantize: bool = False,
) -> Any:
    r"""Returns plain params with $W + s \cdot A B$ in place of each adapted weight.

    The sum is computed in the widest of the dtypes, at least float32, and cast once. Structure,
    shapes and dtypes are those of the tree that was wrapped. A sum with a quantised weight is an
    array of the dtype that the weight dequantises to.

    Args:
      wrapped: what `wrap` returned, trained or not.
      targets: which of the adapted weights to merge, in the forms of `wrap`; all by default. The
        others stay adapted.
      safe: whether to check every merged value, and raise if one is not finite.
      requantize: whether to quantise each sum with a quantised weight again, as that weight is.
        Changes that are smaller than the steps of the format are lost then.

    Returns:
      Plain params of the original structure; with `targets`, a tree that keeps the other adapters.

    Raises:
      ValueError: `targets` matches no adapted weight; `wrapped` is a bank of adapters; with
        `safe`, a merged value is not finite; or, with `requantize`, a weight has a format that is
        only read.

    Warns:
      RequantizationWarning: with `requantize`, how much of each adapter is lost, outside of `jit`.
        `requantization_errors(wrapped)` returns the same numbers.

    Source: Hu et al. 2021, section 4.1, "No additional inference latency".

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> lora_jax.merge(wrapped)["kernel"].shape
      (4, 3)
    """
    index = NodeIndex.of(wrapped)
    chosen = _chosen_paths(index, index, targets)
    nodes = {path: node for path, node in index.nodes.items() if path in chosen}
    again = quantized_nodes(nodes.items()) if requantize else {}
    values = {
        path: requantized_sum(again[path]) if path in again else _merged(path, node)
        for path, node in nodes.items()
    }
    if safe:
        _check_finite(values)
    if again and not any(map(is_tracer, jax.tree.leaves(again))):
        warnings.warn(RequantizationWarning(errors_of(again)), stacklevel=2)
    return index.mapped(values.get)


def unmerge(merged: Any, wrapped: Any, *, targets: Targets | None = None) -> Any:
    r"""Returns the wrapped tree whose adapters were merged into `merged`.

    Each base is $W' - s \cdot A B$, computed in at least float32 and cast once. It equals the
    original to rounding in the weight's dtype; a quantised original is an array here. If `wrapped`
    still holds the original, `unwrap(wrapped)` returns it exactly.

    Args:
      merged: what `merge(wrapped)` returned.
      wrapped: the adapters that were merged. Their bases are not read, and may be None.
      targets: which of the adapters to take out, in the forms of `wrap`; all by default. Weights
        that were not merged are kept.

    Returns:
      A wrapped tree with the same adapters.

    Raises:
      ValueError: the trees or the shapes differ, `targets` matches no adapter, an adapter has a
        magnitude (DoRA), since merging it loses the weight's own norm, or `merged` was quantised
        again, since that rounds the adapter away.

    Source: Hu et al. 2021, section 4.1, on switching tasks by subtracting $B A$.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> lora_jax.unmerge(lora_jax.merge(wrapped), wrapped)["kernel"].base.shape
      (4, 3)
    """
    index, merged_index = NodeIndex.of(wrapped), NodeIndex.of(merged)
    _check_same_structure(merged_index, index)
    chosen = _chosen_paths(merged_index, index, targets)

    def unmerged(path: str, leaf: Any) -> Any:
        if path not in chosen or path not in index.nodes or is_adapter_node(leaf):
            return leaf
        return _unmerged(path, leaf, index.nodes[path])

    return merged_index.tree.mapped(unmerged)


def _merged(path: str, node: AdapterNode) -> AnyArray:
    if isinstance(node, FullWeight):
        return node.value
    check_single(path, node)
    return dense(cast(LoRAWeight, node))


def _unmerged(path: str, leaf: Any, node: AdapterNode) -> LoRAWeight | FullWeight:
    if isinstance(node, FullWeight):
        return dataclasses.replace(node, value=leaf)
    check_single(path, node)
    node = cast(LoRAWeight, node)
    if node.magnitude is not None:
        raise ValueError(
            f"'{path}' has a magnitude (DoRA), and the merged weight has lost its own norm; keep "
            "`wrapped`: unwrap(wrapped) returns the original exactly."
        )
    if is_quantized(leaf):
        raise ValueError(
            f"`merged` is quantised at '{path}', so the adapter's change was rounded, and can't be "
            "taken out of it; keep `wrapped`: unwrap(wrapped) returns the original exactly."
        )
    if not _fits(leaf, node):
        raise ValueError(
            f"`merged` has the shape {leaf.shape} at '{path}', which does not fit the factors of "
            f"its adapter, {node.lora_A.shape} and {node.lora_B.shape}, with the axes {node.axes}; "
            "expected what merge(wrapped) returned."
        )
    base = without_change(leaf, node)
    if is_lora_weight(node.base):
        return dataclasses.replace(node, base=_unmerged(f"{path}/base", base, node.base))
    return dataclasses.replace(node, base=base)


def _fits(leaf: Array, node: LoRAWeight) -> bool:
    if leaf.ndim != len(node.axes):
        return False
    shapes = factor_shapes(layers_shape(leaf.shape, node.axes, node.layers), node.axes, node.rank)
    return (node.lora_A.shape, node.lora_B.shape) == shapes


def _chosen_paths(tree: NodeIndex, index: NodeIndex, targets: Targets | None) -> set[str]:
    """Returns the paths of the nodes of a tree that `targets` selects, with `tree`'s shapes."""
    paths = set(index.nodes)
    if targets is None:
        return paths
    shapes = tree.mapped(lambda _, node: jax.ShapeDtypeStruct(node.shape, node.dtype))
    selected = select(
        shapes,
        targets,
        obstacle=lambda path, leaf, named: None if path in paths else "it is not adapted",
        expected="an adapted weight",
    )
    check_no_overrides(selected, "targets", "what is merged")
    return set(selected)


def _check_finite(merged: Mapping[str, Any]) -> None:
    if any(map(is_tracer, jax.tree.leaves(merged))):
        raise ValueError(
            "`safe` is True, but the values are traced and can't be checked; call "
            "merge(wrapped, safe=True) outside of jax.jit."
        )
    found = not_finite(merged.items())
    if found:
        raise ValueError(
            f"`wrapped` merges to values that are not finite at {listed(found)}; nothing is "
            "returned. summary(wrapped) shows scales and dtypes; a wider dtype of the weight or "
            "an earlier checkpoint may be finite."
        )


def _check_same_structure(merged: NodeIndex, wrapped: NodeIndex) -> None:
    if merged.structure != wrapped.structure:
        raise ValueError(
            "`merged` has a different structure from `wrapped`; expected what merge(wrapped) "
            f"returned.\n`merged`: {merged.structure}\n`wrapped`: {wrapped.structure}"
        )
    if not wrapped.adapted:
        raise ValueError("`wrapped` has no adapters; expected what wrap(params, targets) returned.")
