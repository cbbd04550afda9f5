"""Trainings of the U-Net: of the base, of adapters, and in full."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from numpy.typing import NDArray

import lora_jax
from experiments.common.adamw import clipped_adamw, warmed_up
from experiments.common.compiled_steps import CompiledSteps
from experiments.common.errors import InputError
from experiments.common.resumable import Evaluated, ResumableTraining
from experiments.images.task import ImageTask, folded
from experiments.models.unet import UNet

_EXAMINED = 128
_WARMUP = 0.05


class Batch(NamedTuple):
    """Noisy pictures, what should be predicted of them, and their captions."""

    noised: Float[np.ndarray, "batch places places channels"]
    target: Float[np.ndarray, "batch places places channels"]
    times: NDArray[np.int32]
    text: Float[np.ndarray, "batch tokens width"]


def loss_of(apply: Any, wrapped: Any, batch: Batch) -> Float[Array, ""]:
    """Returns the mean squared error of what is predicted."""
    variables = {"params": wrapped}
    predicted = lora_jax.adapt(apply)(variables, batch.noised, batch.times, batch.text)
    return jnp.mean(jnp.square(predicted - batch.target))


class Batches:
    """The batches of a training, the same each time that they are asked for."""

    def __init__(
        self, task: ImageTask, numbers: NDArray[np.intp], *, size: int, drop: float, seed: int
    ) -> None:
        """Takes the numbers of the pictures to learn from, and how often a caption is left out."""
        self._task, self._numbers, self._size = task, numbers, size
        self._drop, self._seed = drop, seed
        self._noised = jax.jit(task.schedule.noised)
        self._target = jax.jit(task.schedule.target)

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of a step."""
        task, random = self._task, np.random.default_rng((self._seed, step))
        chosen = random.choice(self._numbers, self._size)
        pictures = folded(task.pictures[chosen])
        noise = random.standard_normal(pictures.shape, np.float32)
        times = random.integers(0, task.schedule.num_train_timesteps, self._size, np.int32)
        captions = random.integers(0, task.captions.encoded.shape[1], self._size)
        text = task.captions.encoded[task.labels[chosen], captions]
        is_empty = random.random(self._size) < self._drop
        text = jnp.where(is_empty[:, None, None], task.captions.empty, text)
        return Batch(
            self._noised(pictures, noise, times), self._target(pictures, noise, times), times, text
        )


class Training(ResumableTraining):
    """One training of the U-Net, of whatever trains in a wrapped tree."""

    def __init__(
        self,
        task: ImageTask,
        wrapped: Any,
        numbers: NDArray[np.intp],
        *,
        steps: int,
        batch_size: int,
        learning_rate: float,
        drop: float,
        evaluate_every: int,
        settings: Mapping[str, Any],
    ) -> None:
        """Begins a training on these pictures; `settings` must hold for one that continues it."""
        self._total, self._batch_size = steps, batch_size
        self._batches = Batches(
            task, numbers, size=batch_size, drop=drop, seed=int(settings["seed"])
        )
        rates = warmed_up(learning_rate, warmup=_WARMUP, steps=steps)
        tx = clipped_adamw(rates, weight_decay=0.0)
        apply = UNet(task.config).apply

        def step(trainable: Any, state: Any, frozen: Any, batch: Batch) -> Any:
            def of(trainable: Any) -> Array:
                return loss_of(apply, lora_jax.combine(trainable, frozen), batch)

            loss, gradients = jax.value_and_grad(of)(trainable)
            updates, state = tx.update(gradients, state, trainable)
            return optax.apply_updates(trainable, updates), state, loss

        self._compiled = CompiledSteps(step)
        super().__init__(wrapped, tx, evaluate_every=evaluate_every, settings=settings)

    @property
    def total(self) -> int:
        return self._total

    def batches_left(self) -> Iterable[Batch]:
        return self._batches_from(self.step)

    def taken(self, batch: Batch) -> tuple[Any, optax.OptState, Mapping[str, Any]]:
        arguments = (self._trainable, self._state, self._frozen, batch)
        trainable, state, loss = self._compiled(self._batch_size, *arguments)
        return trainable, state, {"loss": loss}

    def goodness(self, evaluation: Evaluated) -> tuple[float, ...]:
        return (-evaluation["loss"],)

    def progress_note(self) -> str:
        return f"loss {self.history.recent('loss'):.4f}"

    def described(self, evaluation: Evaluated) -> str:
        return f"loss on other noise {evaluation['loss']:.4f}"

    def position(self) -> Any:
        return {"steps": self._total}

    def check_position(self, position: Any) -> None:
        if position != self.position():
            raise InputError(
                f"the training to continue has {position['steps']} steps; pass that number, or "
                "another --out"
            )

    def step_bytes(self) -> int:
        """Returns the memory of a step: arguments and temporaries."""
        first = self._batches[0]
        arguments = (self._trainable, self._state, self._frozen, first)
        self._compiled.compile(self._batch_size, *arguments)
        return self._compiled.bytes

    def _batches_from(self, first: int) -> Iterator[Batch]:
        return (self._batches[step] for step in range(first, self._total))


class Examination:
    """The loss on noise that no step has seen, the same each time."""

    def __init__(self, task: ImageTask, numbers: NDArray[np.intp], *, seed: int) -> None:
        batches = Batches(task, numbers, size=_EXAMINED, drop=0.0, seed=seed)
        self._batch = batches[2**31]
        self._loss = jax.jit(functools.partial(loss_of, UNet(task.config).apply))

    def __call__(self, wrapped: Any) -> dict[str, float]:
        return {"loss": float(self._loss(wrapped, self._batch))}


def in_full(params: Any) -> Any:
    """Returns params that all train."""
    return jax.tree.map(lambda leaf: lora_jax.FullWeight(base=leaf, value=leaf), params)
