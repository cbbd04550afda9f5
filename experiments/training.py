"""One training loop, for full training and for adapters alike.

What trains is the optimiser's business: give `train` plain params with `optax.adam(...)`, or a
wrapped tree with `lora_jax.optimizer(optax.adam(...))` and `lora_jax.adapt(model.apply)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from numpy.typing import NDArray

from experiments.console import Console
from experiments.data.batches import Batches

ApplyFn = Callable[..., Any]
Step = Callable[..., tuple[Any, optax.OptState, Array]]

# Reading a loss waits for its step; reading seldom lets the host run ahead of the device.
_STEPS_PER_LOSS_SHOWN = 50


@dataclass(frozen=True)
class Trained:
    """The parameters after training, and the loss of every step."""

    params: Any
    losses: NDArray[np.float32]


def cross_entropy(logits: Float[Array, "batch classes"], labels: Array) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def training_step(apply_fn: ApplyFn, tx: optax.GradientTransformation) -> Step:
    """Returns the compiled step; it reuses the memory of the params and state that it is given."""

    def step(
        params: Any, state: optax.OptState, inputs: Array, labels: Array
    ) -> tuple[Any, optax.OptState, Array]:
        def loss_of(params: Any) -> Array:
            return cross_entropy(apply_fn({"params": params}, inputs), labels)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def train(
    apply_fn: ApplyFn,
    params: Any,
    tx: optax.GradientTransformation,
    batches: Batches,
    *,
    console: Console,
    description: str,
) -> Trained:
    """Returns the params after one step on each batch; those passed in stay as they are."""
    step = training_step(apply_fn, tx)
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    losses: list[Array] = []
    with console.progress(description, len(batches)) as progress:
        for inputs, labels in batches:
            params, state, loss = step(params, state, inputs, labels)
            losses.append(loss)
            progress.advance()
            if len(losses) % _STEPS_PER_LOSS_SHOWN == 0:
                recent = jax.device_get(losses[-_STEPS_PER_LOSS_SHOWN:])
                progress.show(f"loss {np.mean(recent):.4f}")
        all_losses = np.array(jax.device_get(losses), np.float32)
    return Trained(params, all_losses)
