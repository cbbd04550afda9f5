"""The training step: gradients of several batches, weighted by their parts, and one update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import lora_jax
from experiments.llm.loss import Apply
from experiments.llm.objectives import Objective, Sums
from experiments.llm.packing import Batch

Step = Callable[..., tuple[Any, optax.OptState, Sums]]


def training_step(apply: Apply, tx: optax.GradientTransformation, objective: Objective) -> Step:
    """Returns a step from the trainable half of a wrapped tree, and the state, to the next ones.

    The batches of a step are stacked along a first axis and taken one after the other; their
    gradients are summed, and divided by the number of parts that all of them have together: of
    tokens that are learned, say. So 4 batches of 2 rows give what 1 batch of 8 gives.

    Args:
      apply: the model's `apply`, without adapters.
      tx: the optimiser of what trains.
      objective: what is minimised.
    """

    def loss_of(trainable: Any, frozen: Any, batch: Batch) -> tuple[Float[Array, ""], Sums]:
        wrapped = lora_jax.combine(trainable, frozen)
        sums = objective.sums(apply, wrapped, lora_jax.unwrap(wrapped), batch)
        return sums["loss"], sums

    def step(
        trainable: Any, state: optax.OptState, frozen: Any, batches: Batch
    ) -> tuple[Any, optax.OptState, Sums]:
        parts = jnp.maximum(jnp.sum(objective.count(batches)), 1)

        def add(so_far: Any, batch: Batch) -> tuple[Any, None]:
            gradients, sums = jax.grad(loss_of, has_aux=True)(trainable, frozen, batch)
            return jax.tree.map(jnp.add, so_far, (gradients, sums)), None

        first = jax.tree.map(lambda array: array[0], batches)
        shapes = jax.eval_shape(loss_of, trainable, frozen, first)[1]
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), (trainable, shapes))
        (gradients, sums), _ = jax.lax.scan(add, zeros, batches)
        gradients = jax.tree.map(lambda total: (total / parts).astype(total.dtype), gradients)
        updates, state = tx.update(gradients, state, trainable)
        measured = {
            **{name: total / parts for name, total in sums.items()},
            "parts": parts,
            "seen": batches.seen.astype(jnp.float32),
            "gradient_norm": optax.tree.norm(gradients),
        }
        return optax.apply_updates(trainable, updates), state, measured

    return step
