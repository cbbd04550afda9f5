"""The nodes of a wrapped tree, by their paths."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from lora_jax._folders import CheckpointError
from lora_jax._paths import PathIndex, listed
from lora_jax._weight import (
    AdapterNode,
    LoRABank,
    LoRAWeight,
    changes_base,
    has_factors,
    is_adapter_node,
    is_bank,
    is_lora_weight,
    is_node,
)


@dataclasses.dataclass(frozen=True)
class NodeIndex:
    """The leaves of a tree by their paths, where a node that `wrap` made is one leaf.

    Attributes:
      tree: the paths, the leaves and the structure.
      nodes: the nodes.
    """

    tree: PathIndex
    nodes: Mapping[str, AdapterNode]

    @classmethod
    def of(cls, wrapped: Any) -> "NodeIndex":
        """Returns the index of a tree, wrapped or plain.

        Raises:
          ValueError: two leaves have the same path.
        """
        tree = PathIndex.of(wrapped, is_node)
        nodes = {path: leaf for path, leaf in tree.items() if is_adapter_node(leaf)}
        for path, node in nodes.items():
            check_base(path, node)
        return cls(tree, nodes)

    @property
    def structure(self) -> Any:
        """The structure of the tree, a node of it being a leaf."""
        return self.tree.structure

    @property
    def levels(self) -> Mapping[str, AdapterNode]:
        """The nodes, and at `path/base` each node that is the base of another one."""
        return {
            each: node for path, top in self.nodes.items() for each, node in levels_of(path, top)
        }

    @property
    def adapted(self) -> Mapping[str, LoRAWeight | LoRABank]:
        """The nodes with factors, of one adapter or several."""
        return {path: node for path, node in self.nodes.items() if has_factors(node)}

    @property
    def weights(self) -> Mapping[str, LoRAWeight]:
        """The nodes with one adapter."""
        return {path: node for path, node in self.nodes.items() if is_lora_weight(node)}

    @property
    def banks(self) -> Mapping[str, LoRABank]:
        """The nodes with a bank of adapters."""
        return {path: node for path, node in self.nodes.items() if is_bank(node)}

    def mapped(self, function: Callable[[str, Any], Any]) -> Any:
        """Returns the tree with `function(path, node)` in place of each node; the rest is kept."""
        return self.tree.mapped(
            lambda path, leaf: function(path, leaf) if is_adapter_node(leaf) else leaf
        )

    def mapped_levels(self, function: Callable[[str, Any], Any]) -> Any:
        """Returns the tree with `function(path, node)` in place of each node, inner ones first."""
        return self.mapped(lambda path, node: _mapped_levels(function, path, node))

    def check_single(self) -> None:
        """Raises unless each node with factors holds one adapter."""
        for path, node in self.adapted.items():
            check_single(path, node)


def check_base(path: str, node: AdapterNode) -> None:
    """Raises unless the base of a node is an array or a `LoRAWeight`.

    What an initialiser takes out of a weight, it takes out of an array: a node that stands on
    another one keeps the whole of it.
    """
    if not is_adapter_node(node.base):
        return
    if not has_factors(node) or not is_lora_weight(node.base):
        raise ValueError(
            f"'{path}' is a {type(node).__name__} on a {type(node.base).__name__}; expected an "
            "array as its base, or for a LoRAWeight or a LoRABank a LoRAWeight."
        )
    if changes_base(node):
        raise ValueError(
            f"'{path}' stands on another LoRAWeight, and its initialiser changes its base; "
            "expected one that keeps it, such as 'kaiming', or "
            "arithmetic.on_original_base(wrapped) before the two are put together."
        )
    check_base(f"{path}/base", node.base)


def _mapped_levels(function: Callable[[str, Any], Any], path: str, node: Any) -> Any:
    if is_adapter_node(node.base):
        base = _mapped_levels(function, f"{path}/base", node.base)
        node = node if base is node.base else dataclasses.replace(node, base=base)
    return function(path, node)


def levels_of(path: str, node: AdapterNode) -> Iterator[tuple[str, AdapterNode]]:
    """Yields a node at its path, and the nodes below it at `path/base`."""
    yield path, node
    if is_adapter_node(node.base):
        yield from levels_of(f"{path}/base", node.base)


def adapter_nodes(wrapped: Any, argument: str = "wrapped") -> Mapping[str, AdapterNode]:
    """Returns the nodes of a tree at all levels by path, for saving.

    Args:
      wrapped: a wrapped tree.
      argument: its name in errors.

    Raises:
      CheckpointError: there are none.
    """
    nodes = NodeIndex.of(wrapped).levels
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
    wrapped = list(NodeIndex.of(params).nodes)
    if wrapped:
        raise error(f"`params` is wrapped already at {listed(wrapped)}; {remedy}")


def check_single(path: str, node: LoRAWeight | LoRABank) -> None:
    """Raises unless a node holds one adapter: no bank, and no factors with further axes."""
    if isinstance(node, LoRABank):
        raise ValueError(
            f"'{path}' holds {node.capacity} adapters; expected one. serving.adapt(fn) computes "
            "with them all, and serving.select(bank, id) gives one of them."
        )
    expected = node.axes.count("batch") + node.axes.count("out") + 1
    if node.lora_B.ndim != expected:
        raise ValueError(
            f"'{path}' has a lora_B of shape {node.lora_B.shape} with the axes {node.axes}; "
            f"expected {expected} axes, as one adapter has. serving.bank([...]) holds several "
            "adapters, and jax.vmap maps a function over an axis of them."
        )


def map_nodes(function: Callable[[Any], Any], tree: Any) -> Any:
    """Returns `tree` with `function` applied to each node; the rest is kept."""
    return jax.tree.map(
        lambda node: function(node) if is_adapter_node(node) else node,
        tree,
        is_leaf=is_adapter_node,
    )
