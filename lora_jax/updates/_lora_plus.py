"""LoRA+: a higher learning rate for lora_B."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lora_jax.updates._checks import check_fits, check_positive
from lora_jax.updates._nodes import Node, map_factors
from lora_jax.updates._parts import is_absent


def lora_plus(ratio: float | Array = 16.0) -> optax.GradientTransformation:
    r"""Returns a transformation that multiplies the updates of lora_B by `ratio`.

    $$A \leftarrow A + u_A, \qquad B \leftarrow B + \lambda\, u_B$$

    Placed last in a chain, it makes the learning rate of lora_B $\lambda$ times that of lora_A, for
    any schedule, and scales decoupled weight decay with it, as in PEFT. Other updates pass
    unchanged. It needs no parameters and has no state.

    Args:
      ratio: $\lambda$; the paper recommends 16, and PEFT a lower learning rate with it.
        `optax.inject_hyperparams(lora_plus)(ratio=schedule)` varies it.

    Returns:
      A transformation of updates: a wrapped tree's, within `lora_jax.optimizer`, or those of the
      trainable half from `split`.

    Raises:
      TypeError: `ratio` is not a number.
      ValueError: `ratio` is not positive and finite; or, from `init`, no lora_B trains.

    Source: Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, 2024.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax, optax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> tx = lora_jax.optimizer(optax.chain(optax.sgd(1.0), lora_jax.updates.lora_plus(16.0)))
      >>> gradient = jax.tree.map(jnp.ones_like, wrapped)
      >>> updates, state = tx.update(gradient, tx.init(wrapped), wrapped)
      >>> float(updates["kernel"].lora_A[0, 0]), float(updates["kernel"].lora_B[0, 0])
      (-1.0, -16.0)
    """
    check_positive("ratio", ratio)

    def multiplied(path: str, update: Node) -> Node:
        del path
        if is_absent(update.lora_B):
            return update
        factor = jnp.asarray(ratio, update.lora_B.dtype)
        return dataclasses.replace(update, lora_B=factor * update.lora_B)

    def init(params: Any) -> optax.OptState:
        check_fits("lora_plus", params, {"lora_B"})
        return optax.init_empty_state(params)

    def update(
        updates: Any, state: optax.OptState, params: Any = None
    ) -> tuple[Any, optax.OptState]:
        del params
        return map_factors(multiplied, updates), state

    return optax.GradientTransformation(init, update)
