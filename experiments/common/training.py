"""One training loop, for full training and for adapters alike.

The optimiser decides what trains: give `train` plain params with `optax.adam(...)`, or a wrapped
tree with `lora_jax.optimizer(optax.adam(...))` and `lora_jax.adapt(model.apply)`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from numpy.typing import NDArray

from experiments.common.console import Console

ApplyFn = Callable[..., Any]
Step = Callable[..., tuple[Any, optax.OptState, Array]]

# Reading a loss waits for its step; reading it rarely lets the host run ahead of the device.
_STEPS_PER_LOSS_SHOWN = 50


class Batches(Protocol):
    """A known number of batches, each of inputs and labels."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Any, Any]]: ...


@dataclass(frozen=True)
class Trained:
    """The parameters after training, and the loss of every step."""

    params: Any
    losses: NDArray[np.float32]


def cross_entropy(logits: Float[Array, "batch classes"], labels: Array) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# A function that is jitted again is compiled again; a study compiles each kind of step once.
@lru_cache(maxsize=8)
def training_step(
    apply_fn: ApplyFn, tx: optax.GradientTransformation, *, donate: bool = True
) -> Step:
    """Returns the compiled step, which reuses the memory of the params and the state it is given.

    With `donate=False` it leaves both alone, and so copies in every step what doesn't train.
    """

    def step(
        params: Any, state: optax.OptState, inputs: Array, labels: Array
    ) -> tuple[Any, optax.OptState, Array]:
        def loss_of(params: Any) -> Array:
            return cross_entropy(apply_fn({"params": params}, inputs), labels)

        # Frozen weights may be codes, which are whole numbers.
        loss, gradients = jax.value_and_grad(loss_of, allow_int=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1) if donate else ())


class Training:
    """A training in progress: the step, and the params and optimiser state so far.

    The params that it starts from are left as they are.
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
        """Takes a step on one batch; returns its loss, perhaps before it is computed."""
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
    """Returns the params after one step on each batch; those passed in are left as they are."""
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
