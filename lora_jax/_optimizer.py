"""The optimiser for wrapped trees: it updates what trains, and nothing else."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax._paths import listed
from lora_jax._train import TRAINABLE, labels
from lora_jax._weight import FACTORS
from lora_jax.updates._checks import check_transformation, is_placeholder
from lora_jax.updates._parts import Transformation, is_absent, on_part


def optimizer(
    tx: Transformation | Mapping[str, Transformation],
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimiser for wrapped trees: adapters train, everything else stays unchanged.

    The trainable leaves get the updates of `tx` on the trainable half from `split`, and the state
    is the state of `tx` there: none is allocated for frozen leaves. The updates of frozen leaves
    are zero, so `optax.apply_updates` keeps every bit of them in a compiled step; op by op, some
    processors round numbers below 1e-38 to zero.

    Extra arguments reach `tx`: trees like the wrapped one, such as `grad`, as their trainable half;
    functions of the wrapped tree, such as the `value_fn` of a line search, as functions of that
    half; and the whole tree as `wrapped`, where the transformations of `lora_jax.updates` find the
    frozen leaves.

    A compiled step that returns the whole tree copies the frozen leaves unless the tree is donated:
    `jax.jit(step, donate_argnums=(0, 1))` for a `step(wrapped, state, ...)`.

    Args:
      tx: the transformation for everything that trains, or a mapping from label to transformation
        (`{"lora_A": ..., "lora_B": ...}`); labels that a mapping leaves out stay frozen.

    Returns:
      A transformation whose `init` and `update` take the wrapped tree and its gradient, or the
      trainable half and its gradient.

    Raises:
      TypeError: `tx` is not a transformation.
      ValueError: a label is unknown; or, from `init`, nothing in the tree trains.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, lora_jax, optax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> tx = lora_jax.optimizer(optax.sgd(1e-3, momentum=0.9))
      >>> state = tx.init(wrapped)
      >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
      ... def step(wrapped, state, x):
      ...     def loss(wrapped):
      ...         return jnp.sum(lora_jax.adapt(jnp.dot)(x, wrapped["kernel"]) ** 2)
      ...     updates, state = tx.update(jax.grad(loss)(wrapped), state, wrapped)
      ...     return optax.apply_updates(wrapped, updates), state
      >>> wrapped, state = step(wrapped, state, jnp.ones((2, 4)))
    """
    _check_transformations(tx)
    if isinstance(tx, Mapping):
        trained = frozenset(tx)
        each = {label: on_part(tx[label], label.__eq__) for label in tx}
        moving: optax.GradientTransformationExtraArgs = optax.named_chain(*each.items())
    else:
        trained = frozenset(TRAINABLE)
        moving = on_part(tx, trained.__contains__)

    def init(params: Any) -> optax.OptState:
        trains = trained.intersection(jax.tree.leaves(labels(params)))
        if not trains and not is_placeholder(params):
            raise ValueError(
                "`optimizer` was given a tree in which nothing trains; call "
                "optimizer(tx).init(wrapped) with what `wrap` returned, not with plain params."
            )
        return moving.init(params)

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        state = _whole_nodes(state, moving.init, updates if params is None else params)
        updates, state = moving.update(updates, state, params, **extra_args)

        def kept(label: str | None, update: Any, leaf: Any) -> Any:
            return update if label in trained else _no_change(update, leaf)

        leaves = updates if params is None else params
        return jax.tree.map(kept, labels(updates), updates, leaves, is_leaf=is_absent), state

    return optax.GradientTransformationExtraArgs(init, update)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoUpdate:
    """The update of a leaf that can't be added to, such as a key: adding it changes nothing.

    `optax.apply_updates` adds it like any other update. Weights in host memory get it too.
    """

    # Makes NumPy arrays leave the addition to this class.
    __array_ufunc__ = None

    def __radd__(self, leaf: Any) -> Any:
        return leaf


def _check_transformations(tx: Any) -> None:
    for each in tx.values() if isinstance(tx, Mapping) else [tx]:
        check_transformation("tx", each, or_else="a mapping from label to transformation")
    if isinstance(tx, Mapping) and not set(tx) <= set(TRAINABLE):
        unknown = sorted(set(tx) - set(TRAINABLE))
        raise ValueError(f"`tx` has the labels {listed(unknown)}; expected {listed(TRAINABLE)}.")


def _whole_nodes(state: optax.OptState, init: Callable[[Any], Any], params: Any) -> optax.OptState:
    """Returns a state with nodes where `nnx.Optimizer` has mappings in their place.

    Flax NNX stores a state, including each `LoRAWeight`, as mappings sorted by name. The trainable
    leaves are sorted by name as well, so the leaves match those of `init` in order.
    """
    if not any(map(_is_taken_apart, jax.tree.leaves(state, is_leaf=_is_taken_apart))):
        return state
    expected, structure = jax.tree.flatten(jax.eval_shape(init, params))
    leaves = jax.tree.leaves(state)
    if [jnp.shape(leaf) for leaf in leaves] != [leaf.shape for leaf in expected]:
        raise ValueError(
            "`state` does not belong to `params`; expected what optimizer(tx).init(params) "
            "returned, or an update of it."
        )
    return jax.tree.unflatten(structure, leaves)


def _is_taken_apart(node: Any) -> bool:
    return isinstance(node, Mapping) and any(
        isinstance(node.get(name), jax.Array) for name in (*FACTORS, "value")
    )


def _no_change(update: Any, leaf: Any) -> Any:
    """Returns an update that, added to a leaf, changes none of its bits."""
    if is_absent(update):
        return update
    if not _can_be_added_to(leaf):
        return NoUpdate()
    # -0.0 + 0.0 is 0.0, but x + -0.0 is x for every x.
    zeros = jnp.zeros_like(leaf)
    return -zeros if jnp.issubdtype(zeros.dtype, jnp.inexact) else zeros


def _can_be_added_to(leaf: Any) -> bool:
    """Says whether a leaf holds numbers in memory that the device computes in."""
    type_of_leaf = jax.typeof(leaf)
    is_number = jnp.issubdtype(type_of_leaf.dtype, jnp.number) or type_of_leaf.dtype == jnp.bool_
    return is_number and type_of_leaf.memory_space != jax.memory.Space.Host
