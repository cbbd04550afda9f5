"""Dtypes of sums and products."""

from typing import Any

import jax
import jax.numpy as jnp


def common_dtype(*dtypes: Any) -> Any:
    """Returns the dtype that holds values of all of these.

    Mixing a bfloat16 weight with float32 factors is meant here, also where a user forbids JAX to
    promote dtypes on its own.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def epsilon(dtype: Any) -> float:
    """Returns the distance from 1 to the next number of this dtype."""
    limits: Any = jnp.finfo
    return float(limits(dtype).eps)
