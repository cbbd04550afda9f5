"""What trains and what stays frozen: labels, and the two halves of a tree."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax._nodes import map_nodes
from lora_jax._weight import FACTORS, FullWeight, has_factors, is_adapter_node, is_bank

_FROZEN = "frozen"
TRAINABLE = (*FACTORS, "full")


def labels(wrapped: Any) -> Any:
    """Returns a tree like `wrapped` with a label for each leaf, for `optax.multi_transform`.

    Args:
      wrapped: what `wrap` returned, or one half of it.

    Returns:
      The same structure with `"lora_A"` and `"lora_B"` at the factors, `"magnitude"` at DoRA's
      magnitudes, `"full"` at weights that are trained in full, and `"frozen"` everywhere else.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
      >>> wrapped = lora_jax.wrap(params, "kernel", rank=2)
      >>> lora_jax.labels(wrapped)["kernel"].lora_A, lora_jax.labels(wrapped)["bias"]
      ('lora_A', 'frozen')
    """
    return jax.tree.map(_node_labels, wrapped, is_leaf=is_adapter_node)


def split(wrapped: Any) -> tuple[Any, Any]:
    """Returns the trainable and the frozen half of `wrapped`; each has None at the other's leaves.

    Differentiate with respect to the trainable half and `combine` the two inside the loss; then any
    optimiser can update that half safely. The DoRA norms that a bank caches are in neither half,
    since the factors are about to change; they are recomputed where they are needed.

    Args:
      wrapped: what `wrap` returned.

    Returns:
      adapters: factors, magnitudes and weights trained in full, except those that are frozen.
      frozen: everything else, `base` and `scale` included.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> adapters, frozen = lora_jax.split(wrapped)
      >>> [leaf.shape for leaf in jax.tree.leaves(adapters)]
      [(4, 2), (2, 3)]
    """
    wrapped = map_nodes(_without_norm, wrapped)
    return parts(wrapped, lambda label: label != _FROZEN)


def parts(tree: Any, belongs: Callable[[str], bool]) -> tuple[Any, Any]:
    """Returns the leaves whose label `belongs`, and the others; each has None at the other's."""
    leaf_labels = labels(tree)
    part = jax.tree.map(lambda label, x: x if belongs(label) else None, leaf_labels, tree)
    rest = jax.tree.map(lambda label, x: None if belongs(label) else x, leaf_labels, tree)
    return part, rest


def combine(adapters: Any, frozen: Any) -> Any:
    """Returns the wrapped tree made of these two halves.

    Args:
      adapters: the trainable half, from `split` or an update of it.
      frozen: the frozen half.

    Returns:
      The wrapped tree.

    Raises:
      ValueError: the two are not halves of one tree.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> lora_jax.combine(*lora_jax.split(wrapped))["kernel"].rank
      2
    """
    structure: Any = jax.tree.structure(adapters, is_leaf=_is_none)
    frozen_structure: Any = jax.tree.structure(frozen, is_leaf=_is_none)
    if structure != frozen_structure:
        raise ValueError(
            "`adapters` and `frozen` are not halves of one tree: their structures differ; "
            f"expected both from split(wrapped).\n`adapters`: {structure}\n"
            f"`frozen`: {frozen_structure}"
        )
    leaves = [jax.tree.leaves(half, is_leaf=_is_none) for half in (adapters, frozen)]
    pairs = list(zip(*leaves, strict=True))
    if any(adapter is not None and leaf is not None for adapter, leaf in pairs):
        raise ValueError(
            "`adapters` and `frozen` both hold some of the leaves; expected the two halves that "
            "split(wrapped) gives."
        )
    return jax.tree.unflatten(
        structure, [leaf if adapter is None else adapter for adapter, leaf in pairs]
    )


def _without_norm(node: Any) -> Any:
    return dataclasses.replace(node, norm=None) if is_bank(node) else node


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _node_labels(node: Any) -> Any:
    if has_factors(node):
        labelled = _labelled(node, {name: name for name in FACTORS if name not in node.frozen})
        if not is_adapter_node(node.base):
            return labelled
        return dataclasses.replace(labelled, base=_node_labels(node.base))
    if isinstance(node, FullWeight):
        return _labelled(node, {"value": "full"})
    return _FROZEN


def _labelled(node: Any, trainable: Mapping[str, str]) -> Any:
    """Returns the node with a label in place of each of its leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: trainable.get(key_path[0].name, _FROZEN), node
    )
