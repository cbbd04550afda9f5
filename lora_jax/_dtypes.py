"""Dtypes of sums and products."""

from typing import Any

import jax
import jax.numpy as jnp

_NARROW_INTEGERS = frozenset(
    jnp.dtype(dtype) for dtype in (jnp.int2, jnp.int4, jnp.uint2, jnp.uint4)
)


def common_dtype(*dtypes: Any) -> Any:
    """Returns the dtype that holds values of all of these.

    Mixing a bfloat16 weight with float32 factors is meant here, also where a user forbids JAX to
    promote dtypes on its own. JAX promotes no dtype of eight bits or fewer but int8 and uint8;
    bfloat16 holds every value of those.
    """
    distinct = set(map(jnp.dtype, dtypes))
    if len(distinct) > 1:
        distinct = {jnp.bfloat16 if _is_narrow(dtype) else dtype for dtype in distinct}
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*distinct)


def _is_narrow(dtype: Any) -> bool:
    return is_narrow_float(dtype) or dtype in _NARROW_INTEGERS


def is_narrow_float(dtype: Any) -> bool:
    """Says whether a dtype is a floating-point one of eight bits or fewer."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.dtype(dtype).itemsize == 1


def epsilon(dtype: Any) -> float:
    """Returns the distance from 1 to the next number of this dtype."""
    limits: Any = jnp.finfo
    return float(limits(dtype).eps)


def smallest(dtype: Any) -> float:
    """Returns the smallest normal number of this dtype."""
    limits: Any = jnp.finfo
    return float(limits(dtype).tiny)
