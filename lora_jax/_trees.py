"""What saving and loading ask of a tree: complete adapters, or plain params."""

import dataclasses
from typing import Any

from lora_jax._folders import CheckpointError
from lora_jax._paths import leaves_with_paths, listed
from lora_jax._weight import FullWeight, LoRAWeight, is_adapter_node

AdapterNode = LoRAWeight | FullWeight


def adapter_nodes(wrapped: Any, argument: str = "wrapped") -> dict[str, AdapterNode]:
    """Returns the nodes that `wrap` made, by their path.

    Args:
      wrapped: a wrapped tree.
      argument: what errors call it.

    Raises:
      CheckpointError: there are none.
    """
    leaves = leaves_with_paths(wrapped, is_leaf=is_adapter_node)
    nodes = {path: node for path, node in leaves if is_adapter_node(node)}
    if not nodes:
        raise CheckpointError(
            f"`{argument}` has no adapters; expected what wrap(params, targets) returned."
        )
    return nodes


def check_whole(path: str, node: AdapterNode) -> None:
    """Raises a `CheckpointError` if `node` belongs to one half of a tree."""
    for field in dataclasses.fields(node):
        if field.default is dataclasses.MISSING and getattr(node, field.name) is None:
            raise CheckpointError(
                f"`wrapped` has no `{field.name}` at '{path}'; expected a whole tree, such as "
                "combine(adapters, frozen)."
            )


def check_plain(params: Any, remedy: str, error: type[ValueError] = CheckpointError) -> None:
    """Raises an `error` that ends with `remedy` if `params` holds a node that `wrap` made."""
    wrapped = [
        path
        for path, node in leaves_with_paths(params, is_leaf=is_adapter_node)
        if is_adapter_node(node)
    ]
    if wrapped:
        raise error(f"`params` is wrapped already at {listed(wrapped)}; {remedy}")
