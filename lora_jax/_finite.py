"""Finding values that are not finite."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from lora_jax._compat import is_tracer


def not_finite(arrays: Iterable[tuple[str, Any]]) -> list[str]:
    """Returns the names of the arrays that hold NaN or infinity; traced ones are skipped.

    A quantised weight counts as the arrays that it holds.
    """
    concrete = [
        (name, array) for name, array in arrays if not any(map(is_tracer, jax.tree.leaves(array)))
    ]
    if not concrete:
        return []
    # One transfer for all of them; also where a function that is being traced holds the arrays.
    with jax.ensure_compile_time_eval():
        finite = np.asarray(jnp.stack([_is_finite(array) for _, array in concrete]))
    return [name for (name, _), each in zip(concrete, finite, strict=True) if not each]


@jax.jit
def _is_finite(array: Any) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(array)]))
