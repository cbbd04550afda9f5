"""Arrays for tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def random(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    """Returns normally distributed numbers.

    NumPy draws them: JAX would compile a program for each shape.
    """
    numbers = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return jax.device_put(numbers.astype(dtype))
