"""The training step: gradients of several batches, weighted by token, and one update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import lora_jax
from experiments.llm.loss import Apply, summed_loss
from experiments.llm.packing import Batch

Step = Callable[..., tuple[Any, optax.OptState, "StepResult"]]
StepResult = dict[str, Float[Array, ""]]


def training_step(apply: Apply, tx: optax.GradientTransformation) -> Step:
    """Returns a step from the trainable half of a wrapped tree, and the state, to the next ones.

    The batches of a step are stacked along a first axis and taken one after the other; their
    gradients are summed, and divided by the number of tokens that all of them learn together. So
    4 batches of 2 rows give what 1 batch of 8 gives.

    Args:
      apply: the model's `apply`, without adapters.
      tx: the optimiser of what trains.
    """
    adapted = lora_jax.adapt(apply)

    def loss_of(trainable: Any, frozen: Any, batch: Batch) -> Float[Array, ""]:
        return summed_loss(adapted, lora_jax.combine(trainable, frozen), batch)

    def step(
        trainable: Any, state: optax.OptState, frozen: Any, batches: Batch
    ) -> tuple[Any, optax.OptState, StepResult]:
        tokens = jnp.maximum(jnp.sum(batches.weights), 1)

        def add(sums: tuple[Array, Any], batch: Batch) -> tuple[tuple[Array, Any], None]:
            found = jax.value_and_grad(loss_of)(trainable, frozen, batch)
            return jax.tree.map(jnp.add, sums, found), None

        zeros = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable)
        (loss, gradients), _ = jax.lax.scan(add, zeros, batches)
        gradients = jax.tree.map(lambda sum_: (sum_ / tokens).astype(sum_.dtype), gradients)
        updates, state = tx.update(gradients, state, trainable)
        result = {
            "loss": loss / tokens,
            "tokens": tokens,
            "seen": jnp.sum(batches.segments != 0).astype(jnp.float32),
            "gradient_norm": optax.tree.norm(gradients),
        }
        return optax.apply_updates(trainable, updates), state, result

    return step
