"""The training step on sentences, compiled once for each length, and its optimiser."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, PRNGKeyArray

import lora_jax
from experiments.common.training import ApplyFn, cross_entropy
from experiments.data.tokens import TokenBatch
from experiments.text.methods import Method
from experiments.text.options import TrainingOptions
from experiments.text.task import adapted_apply

GREATEST_GRADIENT = 1.0


class CompiledSteps:
    """The training step of one method, compiled once for each length of batches."""

    def __init__(self, apply_fn: ApplyFn, tx: optax.GradientTransformation, dropout: float) -> None:
        self._step = jax.jit(_training_step(apply_fn, tx, dropout))
        self._compiled: dict[int, Any] = {}

    def compile(self, length: int, *arguments: Any) -> None:
        if length not in self._compiled:
            self._compiled[length] = self._step.lower(*arguments).compile()

    def __call__(self, length: int, *arguments: Any) -> Any:
        self.compile(length, *arguments)
        return self._compiled[length](*arguments)

    @property
    def bytes(self) -> int:
        """The memory of the step with the longest sentences: arguments, results, temporaries."""
        found = self._compiled[max(self._compiled)].memory_analysis()
        sizes = (
            found.argument_size_in_bytes,
            found.output_size_in_bytes,
            found.temp_size_in_bytes,
            -found.alias_size_in_bytes,
        )
        return sum(sizes)


def _training_step(
    apply_fn: ApplyFn, tx: optax.GradientTransformation, dropout: float
) -> Callable[..., Any]:
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
    """Returns the learning rate of each step, which rises from 0 and falls to 0."""
    warmup = min(max(1, round(training.warmup * steps)), steps - 1) if training.warmup else 0
    greatest = training.learning_rate or method.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else greatest, greatest, warmup, steps)


def optimizer(
    training: TrainingOptions, method: Method, steps: int
) -> optax.GradientTransformation:
    """Returns AdamW with those learning rates, and gradients clipped to `GREATEST_GRADIENT`."""
    return optax.chain(
        optax.clip_by_global_norm(GREATEST_GRADIENT),
        optax.adamw(learning_rates(training, method, steps), weight_decay=training.weight_decay),
    )
