"""Checks of these transformations' options, and of the trees that they work on."""

import math
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from lora_jax._paths import listed
from lora_jax._train import labels
from lora_jax._weight import has_factors


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


def check_transformation(argument: str, value: Any, *, or_else: str | None = None) -> None:
    """Raises unless `value` is an optax transformation.

    Args:
      argument: its name in errors.
      value: the value given.
      or_else: what else the argument may be, in words.
    """
    if not (hasattr(value, "init") and hasattr(value, "update")):
        other = "" if or_else is None else f", or {or_else}"
        raise TypeError(
            f"`{argument}` is {value!r}; expected an optax transformation, such as "
            f"optax.adam(1e-3){other}."
        )


def is_placeholder(params: Any) -> bool:
    """Says whether `params` is the placeholder by which `optax.tree.map_params` finds parameters.

    It is a node without children of a type of optax's own.
    """
    is_container = params is None or isinstance(params, dict | list | tuple)
    return not is_container and not jax.tree.leaves(params)


def check_fits(transformation: str, params: Any, trained: Collection[str]) -> None:
    """Raises unless something in `params` trains that a transformation updates.

    Args:
      transformation: its name.
      params: what its `init` was given.
      trained: the labels that it updates.
    """
    if is_placeholder(params):
        return
    if not any(map(has_factors, jax.tree.leaves(params, is_leaf=has_factors))):
        raise ValueError(
            "`params` has no adapters; expected what `wrap` returned, or its trainable half from "
            "split(wrapped)."
        )
    found = set(jax.tree.leaves(labels(params)))
    if not found.intersection(trained):
        raise ValueError(
            f"`{transformation}` was given a tree in which nothing trains that it moves; expected "
            f"at least one of {listed(sorted(trained))}, and `params` has {listed(sorted(found))}. "
            "A leaf that `wrap(..., freeze=...)` froze does not train."
        )
