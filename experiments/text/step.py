"""The training step on sentences, and its optimiser."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, PRNGKeyArray

import lora_jax
from experiments.common.adamw import clipped_adamw, warmed_up
from experiments.common.training import ApplyFn, cross_entropy
from experiments.data.tokens import TokenBatch
from experiments.text.methods import Method
from experiments.text.options import TrainingOptions
from experiments.text.task import adapted_apply


def training_step(
    apply_fn: ApplyFn, tx: optax.GradientTransformation, dropout: float
) -> Callable[..., Any]:
    """Returns the step of a classifier."""
    adapted = adapted_apply(apply_fn, dropout)

    def step(
        trainable: Any,
        state: optax.OptState,
        frozen: Any,
        batch: TokenBatch,
        number: Array,
        key: PRNGKeyArray,
    ) -> tuple[Any, optax.OptState, Array, Array]:
        # Each step has its own key: a resumed run draws the same numbers as an unbroken one.
        model_key, adapter_key = jax.random.split(jax.random.fold_in(key, number))
        for_adapters = {"lora_key": adapter_key} if dropout else {}

        def loss_of(trainable: Any) -> tuple[Array, Array]:
            logits = adapted(
                {"params": lora_jax.combine(trainable, frozen)},
                batch.token_ids,
                batch.mask,
                deterministic=False,
                rngs={"dropout": model_key},
                **for_adapters,
            )
            right = (logits.argmax(axis=-1) == batch.labels).mean()
            return cross_entropy(logits, batch.labels), right

        (loss, right), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        updates, state = tx.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss, right

    return step


def learning_rates(training: TrainingOptions, method: Method, steps: int) -> optax.Schedule:
    """Returns the learning rate of each step."""
    greatest = training.learning_rate or method.learning_rate
    return warmed_up(greatest, warmup=training.warmup, steps=steps)


def optimizer(
    training: TrainingOptions, method: Method, steps: int
) -> optax.GradientTransformation:
    """Returns AdamW with those learning rates."""
    rates = learning_rates(training, method, steps)
    return clipped_adamw(rates, weight_decay=training.weight_decay)
