"""One training loop, for full training and for adapters alike.

What trains is the optimiser's business: give `train` plain params with `optax.adam(...)`, or a
wrapped tree with `lora_jax.optimizer(optax.adam(...))` and `lora_jax.adapt(model.apply)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
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


# The same function jitted anew is compiled anew; a study of many trainings compiles each kind once.
@lru_cache(maxsize=8)
def training_step(
    apply_fn: ApplyFn, tx: optax.GradientTransformation, *, donate: bool = True
) -> Step:
    """Returns the compiled step; it reuses the memory of the params and state that it is given.

    With `donate=False` it leaves them alone, and so copies what doesn't train in every step.
    """

    def step(
        params: Any, state: optax.OptState, inputs: Array, labels: Array
    ) -> tuple[Any, optax.OptState, Array]:
        def loss_of(params: Any) -> Array:
            return cross_entropy(apply_fn({"params": params}, inputs), labels)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1) if donate else ())


class Training:
    """A training step, and the params and the optimiser state that it has reached.

    The params that it is given stay as they are.
    """

    def __init__(
        self,
        apply_fn: ApplyFn,
        params: Any,
        tx: optax.GradientTransformation,
        *,
        donate: bool = True,
    ) -> None:
        self._step = training_step(apply_fn, tx, donate=donate)
        self.params = jax.tree.map(jnp.copy, params)
        self._state = tx.init(self.params)

    def take_step(self, inputs: Any, labels: Any) -> Float[Array, ""]:
        """Takes a step on one batch and returns its loss, perhaps before the device is done."""
        self.params, self._state, loss = self._step(self.params, self._state, inputs, labels)
        return loss


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
    training = Training(apply_fn, params, tx)
    losses: list[Array] = []
    with console.progress(description, len(batches)) as progress:
        for inputs, labels in batches:
            losses.append(training.take_step(inputs, labels))
            progress.advance()
            if len(losses) % _STEPS_PER_LOSS_SHOWN == 0:
                recent = jax.device_get(losses[-_STEPS_PER_LOSS_SHOWN:])
                progress.show(f"loss {np.mean(recent):.4f}")
        all_losses = np.array(jax.device_get(losses), np.float32)
    return Trained(training.params, all_losses)
