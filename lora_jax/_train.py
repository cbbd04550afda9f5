"""What trains and what stays frozen: labels, the two halves of a tree, and the optimiser."""

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import optax

from lora_jax._paths import listed
from lora_jax._weight import FullWeight, LoRAWeight, is_adapter_node
from lora_jax.optimizers._extra_args import open_to_extra_args

_FROZEN = "frozen"
_FACTORS = ("lora_A", "lora_B", "magnitude")
_TRAINABLE = (*_FACTORS, "full")


def labels(wrapped: Any) -> Any:
    """Returns a tree like `wrapped` with a label for each leaf, for `optax.multi_transform`.

    Args:
      wrapped: what `wrap` returned, or a half of it.

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
    """Returns the trainable half of `wrapped` and the frozen one; each has None for the other's.

    Differentiate with respect to the first and `combine` inside the loss, and any optimiser on it
    is safe.

    Args:
      wrapped: what `wrap` returned.

    Returns:
      adapters: factors, magnitudes and weights trained in full, but for what `freeze` froze.
      frozen: all else, `base` and `scale` included.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> adapters, frozen = lora_jax.split(wrapped)
      >>> [leaf.shape for leaf in jax.tree.leaves(adapters)]
      [(4, 2), (2, 3)]
    """
    leaf_labels = labels(wrapped)
    adapters = jax.tree.map(lambda label, x: None if label == _FROZEN else x, leaf_labels, wrapped)
    frozen = jax.tree.map(lambda label, x: x if label == _FROZEN else None, leaf_labels, wrapped)
    return adapters, frozen


def combine(adapters: Any, frozen: Any) -> Any:
    """Returns the wrapped tree whose halves these are.

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
            "`adapters` and `frozen` are not halves of one tree, having different structures; "
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


def optimizer(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimiser for wrapped trees: adapters train, everything else is set to zero.

    It is `optax.multi_transform` over `labels`. Its state holds arrays for trainable leaves only.
    Transformations that take extra arguments get the whole tree as `wrapped`, so that those of
    `lora_jax.optimizers` find what is masked.

    Args:
      tx: the transformation for all that trains, or a mapping from label to transformation
        (`{"lora_A": ..., "lora_B": ...}`); labels that a mapping leaves out stay frozen.

    Returns:
      A transformation whose `init` and `update` take the wrapped tree and its gradient.

    Raises:
      TypeError: `tx` is no transformation.
      ValueError: a label is unknown; or, from `init`, the tree has nothing that trains.

    Source: optax's `multi_transform` and `set_to_zero`.

    Examples:
      >>> import jax.numpy as jnp, lora_jax, optax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> state = lora_jax.optimizer(optax.adam(1e-3)).init(wrapped)
    """
    _check_transformations(tx)
    by_label = dict(tx) if isinstance(tx, Mapping) else None
    if by_label is not None and not set(by_label) <= set(_TRAINABLE):
        unknown = sorted(set(by_label) - set(_TRAINABLE))
        raise ValueError(f"`tx` has the labels {listed(unknown)}; expected {listed(_TRAINABLE)}.")
    grouped = optax.multi_transform(
        {**_by_group(tx), _FROZEN: optax.set_to_zero()},
        lambda tree: jax.tree.map(lambda label: _group(label, by_label), labels(tree)),
    )

    def init(params: Any) -> optax.OptState:
        groups = {_group(label, by_label) for label in jax.tree.leaves(labels(params))}
        if not groups - {_FROZEN}:
            raise ValueError(
                "`optimizer` was given a tree in which nothing trains; call "
                "optimizer(tx).init(wrapped) with what `wrap` returned, not with plain params."
            )
        return grouped.init(params)

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        return grouped.update(updates, state, params, **{"wrapped": params, **extra_args})

    return optax.GradientTransformationExtraArgs(init, update)


def _check_transformations(tx: Any) -> None:
    for each in tx.values() if isinstance(tx, Mapping) else [tx]:
        if not (hasattr(each, "init") and hasattr(each, "update")):
            raise TypeError(
                f"`tx` is {tx!r}; expected an optax transformation, such as optax.adam(1e-3), or a "
                "mapping from label to transformation."
            )


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _by_group(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
) -> dict[Hashable, optax.GradientTransformation]:
    """Returns a group for each label; for one transformation one, so that it sees all at once."""
    by_group: Mapping[str, optax.GradientTransformation] = (
        tx if isinstance(tx, Mapping) else {"trainable": tx}
    )
    return {group: open_to_extra_args(each) for group, each in by_group.items()}


def _group(label: str, by_label: Mapping[str, Any] | None) -> str:
    if by_label is not None:
        return label if label in by_label else _FROZEN
    return label if label == _FROZEN else "trainable"


def _node_labels(node: Any) -> Any:
    if isinstance(node, LoRAWeight):
        return _labelled(node, {name: name for name in _FACTORS if name not in node.frozen})
    if isinstance(node, FullWeight):
        return _labelled(node, {"value": "full"})
    return _FROZEN


def _labelled(node: Any, trainable: Mapping[str, str]) -> Any:
    """Returns the node with a label in place of each leaf that it holds."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: trainable.get(key_path[0].name, _FROZEN), node
    )
