"""Wrapped trees as they are after some steps of training."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import lora_jax

TRAINS = ("lora_A", "lora_B", "magnitude", "full")


def as_if_trained(wrapped: Any, seed: int = 13, *, only: Sequence[str] = TRAINS) -> Any:
    """Returns `wrapped` with other numbers in all that trains, each array placed as it was.

    Magnitudes are multiplied by positive numbers, since a norm is positive; to all else noise is
    added, without which lora_B would be zero. NumPy draws it: JAX would compile a program for each
    shape.

    Args:
      wrapped: what `wrap` returned.
      seed: another one gives other numbers.
      only: the labels of what changes, of those that `lora_jax.labels` gives to what trains.
    """
    random = np.random.default_rng(seed)

    def value(label: str, leaf: Any) -> Any:
        if label not in only:
            return leaf
        numbers = np.asarray(leaf, np.float64)
        if label == "magnitude":
            numbers = numbers * random.uniform(0.5, 1.5, numbers.shape)
        else:
            numbers = numbers + random.normal(size=numbers.shape) / 4
        drawn = jax.device_put(numbers.astype(leaf.dtype))
        return jax.device_put(drawn, leaf.sharding) if leaf.committed else drawn

    return jax.tree.map(value, lora_jax.labels(wrapped), wrapped)
