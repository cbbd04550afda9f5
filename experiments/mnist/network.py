"""The network of the MNIST studies, deliberately larger than MNIST needs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

import lora_jax
from experiments.data.images import CLASSES, PIXELS
from experiments.models.mlp import MLP

# The mean and standard deviation of MNIST's training pixels, as fractions of 255.
_PIXEL_MEAN = 0.1307
_PIXEL_DEVIATION = 0.3081


def normalised(images: UInt8[Array, "batch pixels"]) -> Float[Array, "batch pixels"]:
    return (images.astype(jnp.float32) / 255 - _PIXEL_MEAN) / _PIXEL_DEVIATION


NETWORK = MLP(hidden=(1000, 2000), classes=CLASSES, preprocess=normalised)
LAYERS = ("hidden_1", "hidden_2", "output")
# One function for all uses, so that what was compiled for it is found again.
ADAPTED_APPLY = lora_jax.adapt(NETWORK.apply)


def initial_params(seed: int) -> Any:
    """Returns the network's parameters before any training."""
    return jax.jit(NETWORK.init)(jax.random.key(seed), np.zeros((1, PIXELS), np.uint8))["params"]


def check_adapters_fit(wrapped: Callable[[Any], Any]) -> None:
    """Checks the arguments of `lora_jax.wrap` before any training, from shapes alone.

    Args:
      wrapped: a function from the network's params to wrapped ones; what it raises is raised.
    """
    jax.eval_shape(wrapped, jax.eval_shape(initial_params, 0))
