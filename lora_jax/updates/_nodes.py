"""Pairing an update with the weight that it belongs to.

A transformation meets the tree in three forms: whole; masked by `optax.multi_transform`, with an
`optax.MaskedNode` for every leaf of another group; and as the trainable half of a `split`, with
None for every frozen leaf. Leaves that the form at hand leaves out are looked up in `wrapped`, the
whole tree, an extra argument of `update`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax._paths import leaves_with_paths
from lora_jax._weight import LoRABank, LoRAWeight, has_factors, is_adapter_node
from lora_jax.updates._parts import is_absent

Node = LoRAWeight | LoRABank


@dataclasses.dataclass(frozen=True)
class KnownWeight:
    """What is known of one weight: its nodes in the trees at hand."""

    path: str
    transformation: str
    nodes: tuple[Node, ...]

    def leaf(self, name: str) -> jax.Array:
        """Returns a leaf from the first tree that has it; raises if none has."""
        for node in self.nodes:
            if not is_absent(getattr(node, name)):
                return getattr(node, name)
        raise ValueError(
            f"`{self.transformation}` needs {name} of '{self.path}', which `params` leaves out; "
            "pass the whole tree as `wrapped`: tx.update(gradients, state, adapters, "
            "wrapped=lora_jax.combine(adapters, frozen)). The update of lora_jax.optimizer(tx) "
            "does this itself: update(gradients, state, wrapped)."
        )


def map_factors(function: Callable[..., Node], updates: Any, /, **trees: Any) -> Any:
    """Returns `updates` with `function(path, node, *nodes)` for each node with factors.

    Args:
      function: what to do to a node; it also gets the node's path and the nodes of `trees` there.
      updates: a tree in any of the three forms; nodes without factors are kept.
      trees: further trees by the argument's name, with such a node wherever `updates` has one.

    Raises:
      ValueError: there is no such node, so that a transformation would silently do nothing; or
        one of `trees` doesn't match.
    """
    structure: Any = jax.tree.structure(updates, is_leaf=_is_place)
    places = leaves_with_paths(updates, is_leaf=_is_place)
    if not any(has_factors(node) for _, node in places):
        raise ValueError(
            "`updates` has no adapters; expected the gradient of what `wrap` returned, or of its "
            "trainable half from split(wrapped)."
        )
    others = [_nodes_at(places, structure, name, tree) for name, tree in trees.items()]
    return jax.tree.unflatten(
        structure,
        [
            _mapped(function, path, node, nodes) if has_factors(node) else node
            for (path, node), *nodes in zip(places, *others, strict=True)
        ],
    )


def map_with_weights(
    function: Callable[[Node, KnownWeight], Node],
    updates: Any,
    *,
    params: Any,
    wrapped: Any,
    name: str,
) -> Any:
    """Returns `updates` with `function(update, weight)` for each node with factors.

    Args:
      function: what to do to a node; `weight` has the leaves of `params`, and those of `wrapped`
        where `params` leaves them out.
      updates: a tree in any of the three forms.
      params: the parameters in the same form, or None.
      wrapped: the whole tree, or None.
      name: the transformation's name in errors.

    Raises:
      ValueError: neither tree is given, or one doesn't match.
    """
    trees = {"params": params, "wrapped": wrapped}
    given = {argument: tree for argument, tree in trees.items() if tree is not None}
    if not given:
        raise ValueError(
            f"`params` is None, and `{name}` computes with the factors; call "
            "tx.update(gradients, state, params)."
        )
    return map_factors(
        lambda path, update, *nodes: function(update, KnownWeight(path, name, nodes)),
        updates,
        **given,
    )


def _mapped(function: Callable[..., Node], path: str, update: Node, nodes: Sequence[Node]) -> Node:
    """Returns the mapped node; a base that is a node itself is mapped too."""
    mapped = function(path, update, *nodes)
    if not has_factors(update.base):
        return mapped
    inner = _mapped(function, f"{path}/base", update.base, [node.base for node in nodes])
    return dataclasses.replace(mapped, base=inner)


def _is_place(node: Any) -> bool:
    return is_adapter_node(node) or is_absent(node)


def _nodes_at(
    places: Sequence[tuple[str, Any]], structure: Any, argument: str, tree: Any
) -> list[Any]:
    """Returns what `tree` has at each of `places`."""
    try:
        nodes = structure.flatten_up_to(tree)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{argument}` has a different structure from the updates; expected the tree whose "
            f"gradient they are. {error}"
        ) from error
    for (path, update), node in zip(places, nodes, strict=True):
        if has_factors(update) and not has_factors(node):
            raise ValueError(
                f"`{argument}` has a {type(node).__name__} at '{path}', where the updates have "
                "factors; expected the tree whose gradient they are."
            )
    return list(nodes)
