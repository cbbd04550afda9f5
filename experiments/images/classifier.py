"""A classifier of real digits, which says what a drawn one is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float
from numpy.typing import NDArray

from experiments.common.console import Console
from experiments.common.stores import BaseCheckpoint
from experiments.common.training import Trained, train
from experiments.images.task import ImageTask
from experiments.models.unet.layers import Image

_STEPS, _BATCH, _RATE = 600, 128, 2e-3
_TESTED_AT_ONCE = 1_000


class Classifier(nn.Module):
    """Two convolutions and two dense layers."""

    @nn.compact
    def __call__(self, images: Image) -> Float[Array, "batch digits"]:
        x = images
        for channels in (16, 32):
            x = nn.relu(nn.Conv(channels, (3, 3), strides=(2, 2))(x))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


class _Batches:
    """Pictures of all digits, drawn for each step."""

    def __init__(self, task: ImageTask, seed: int) -> None:
        self._task, self._seed = task, seed

    def __len__(self) -> int:
        return _STEPS

    def __iter__(self) -> Any:
        random = np.random.default_rng((self._seed, 3))
        for _ in range(_STEPS):
            chosen = random.integers(0, len(self._task.labels), _BATCH)
            yield self._task.pictures[chosen], self._task.labels[chosen]


class Judge:
    """The trained classifier.

    Attributes:
      accuracy: how many of the test set's digits it recognises.
    """

    def __init__(self, task: ImageTask, checkpoint: BaseCheckpoint, console: Console) -> None:
        """Trains it, or reads it if it has been trained."""
        stored = checkpoint.load(console)
        if stored is None:
            stored = self._trained(task, int(checkpoint.settings["seed"]), console)
            checkpoint.save(stored)
        self._params = stored.params
        self._apply = jax.jit(Classifier().apply)
        self.accuracy = float(np.mean(self.digits(task.test) == task.test_labels))

    def digits(self, images: Any) -> NDArray[np.int64]:
        """Returns the digit that each picture shows."""
        parts = [
            np.asarray(
                self._apply({"params": self._params}, images[start : start + _TESTED_AT_ONCE])
            )
            for start in range(0, len(images), _TESTED_AT_ONCE)
        ]
        return np.concatenate(parts).argmax(axis=-1)

    @staticmethod
    def _trained(task: ImageTask, seed: int, console: Console) -> Trained:
        params = Classifier().init(jax.random.key(seed), jnp.asarray(task.pictures[:1]))["params"]
        return train(
            Classifier().apply,
            params,
            optax.adam(_RATE),
            _Batches(task, seed),
            console=console,
            description="Training the classifier",
        )
