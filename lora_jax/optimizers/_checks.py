"""What the options of these transformations may be."""

import math
from typing import Any

import jax
import numpy as np


def check_positive(argument: str, value: Any) -> None:
    """Raises unless `value` is a positive, finite number.

    An array passes as it is: `optax.inject_hyperparams` makes the options arrays, which under jit
    have no value yet.
    """
    if isinstance(value, jax.Array):
        return
    if isinstance(value, bool | str) or not hasattr(value, "__float__") or np.ndim(value) != 0:
        raise TypeError(f"`{argument}` is {value!r}; expected a number.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{argument}` is {value}; expected a positive, finite number.")


def check_transformation(argument: str, value: Any) -> None:
    """Raises unless `value` is an optax transformation."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"`{argument}` is {value!r}; expected an optax transformation, such as "
            "optax.adam(1e-3)."
        )
