"""What of a wrapped tree is stored: all that does not follow from the original weights."""

import dataclasses
from typing import Any

from jaxtyping import PyTree

from lora_jax._folders import CheckpointError
from lora_jax._paths import leaves_with_paths
from lora_jax._weight import FullWeight, LoRAWeight, is_adapter_node

AdapterNode = LoRAWeight | FullWeight

# What restoring finds in the params or computes from them.
_OF_THE_BASE = frozenset({"base", "squared_norm", "norm"})


def adapter_nodes(wrapped: PyTree, argument: str = "wrapped") -> dict[str, AdapterNode]:
    """Returns the nodes that `wrap` made, by their path; errors name `argument`."""
    leaves = leaves_with_paths(wrapped, is_leaf=is_adapter_node)
    nodes = {path: node for path, node in leaves if is_adapter_node(node)}
    if not nodes:
        raise CheckpointError(
            f"`{argument}` has no adapters; expected what wrap(params, targets) returned."
        )
    return nodes


def saved_arrays(path: str, node: AdapterNode) -> dict[str, Any]:
    """Returns the arrays of a node that are stored, by their name."""
    arrays = {}
    for field in dataclasses.fields(node):
        leaf = getattr(node, field.name)
        if leaf is None and field.default is dataclasses.MISSING:
            raise CheckpointError(
                f"`wrapped` has no `{field.name}` at '{path}'; expected a whole tree, such as "
                "combine(adapters, frozen)."
            )
        if leaf is None or field.metadata.get("static"):
            continue
        if field.name not in _OF_THE_BASE:
            arrays[field.name] = leaf
    return arrays
