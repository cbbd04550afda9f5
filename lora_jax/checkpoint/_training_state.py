"""The state of training: two trees, and the leaves of them that are stored."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from lora_jax._algebra import with_norm
from lora_jax._paths import leaves_with_paths, map_with_paths
from lora_jax._weight import FullWeight, is_adapter_node
from lora_jax.checkpoint._leaves import LeavesWithPaths
from lora_jax.checkpoint._nodes import AdapterNode, adapter_nodes, saved_arrays


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """What `TrainingCheckpoints.restore` returns.

    Attributes:
      wrapped: the wrapped tree, with all that is trained as it was.
      optimizer_state: the optimiser's state, or whatever tree was saved as it.
      step: the step that it was saved as.
      data_position: what was saved as it.
      metrics: the metrics that were saved, as Python numbers.
    """

    wrapped: PyTree
    optimizer_state: PyTree
    step: int
    data_position: Any
    metrics: Mapping[str, float]


def stored_leaves(wrapped: PyTree, optimizer_state: PyTree) -> LeavesWithPaths:
    """Returns what a training checkpoint stores of both trees, beside the paths."""
    of_wrapped = [
        (f"wrapped/{path}/{name}", array)
        for path, node in adapter_nodes(wrapped).items()
        for name, array in saved_arrays(path, node).items()
    ]
    of_optimizer = leaves_with_paths(optimizer_state)
    return of_wrapped + [(f"optimizer_state/{path}", leaf) for path, leaf in of_optimizer]


def with_leaves(
    wrapped: PyTree, optimizer_state: PyTree, leaves: Sequence[Any]
) -> tuple[PyTree, PyTree]:
    """Returns both trees with `leaves`, in the order of `stored_leaves`, in place of their own."""
    remaining = iter(leaves)
    arrays = {
        path: {name: next(remaining) for name in saved_arrays(path, node)}
        for path, node in adapter_nodes(wrapped).items()
    }
    new_wrapped = map_with_paths(
        lambda path, node: _restored(node, arrays[path]) if is_adapter_node(node) else node,
        wrapped,
        is_leaf=is_adapter_node,
    )
    return new_wrapped, jax.tree.unflatten(jax.tree.structure(optimizer_state), list(remaining))


def _restored(node: AdapterNode, arrays: Mapping[str, Any]) -> AdapterNode:
    restored = dataclasses.replace(node, **arrays)
    if isinstance(restored, FullWeight) or restored.norm is None:
        return restored
    # A stack keeps the norms of its factors, which have come just now.
    return with_norm(restored)
