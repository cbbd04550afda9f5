"""The networks of the studies: plain Flax modules that know nothing of LoRA."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

# The mean and standard deviation of MNIST's training pixels, as fractions of 255.
_PIXEL_MEAN = 0.1307
_PIXEL_DEVIATION = 0.3081


def unchanged(inputs: Array) -> Array:
    return inputs


def normalised(images: UInt8[Array, "batch pixels"]) -> Float[Array, "batch pixels"]:
    return (images.astype(jnp.float32) / 255 - _PIXEL_MEAN) / _PIXEL_DEVIATION


class MLP(nn.Module):
    """ReLU layers `hidden_1`, `hidden_2`, ... and a linear layer `output`."""

    hidden: tuple[int, ...]
    classes: int
    preprocess: Callable[[Array], Array] = unchanged

    @nn.compact
    def __call__(self, inputs: Array) -> Float[Array, "batch classes"]:
        x = self.preprocess(inputs)
        for number, width in enumerate(self.hidden, start=1):
            x = nn.relu(nn.Dense(width, name=f"hidden_{number}")(x))
        return nn.Dense(self.classes, name="output")(x)
