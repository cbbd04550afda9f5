"""Where restored arrays go: to the shardings of the tree that they are restored into."""

from typing import Any

import jax


def sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
    """Returns where an array has to be; None where JAX is free to move it, as it is by default."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return getattr(leaf, "sharding", None)


def placed(array: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """Returns `array` where it has to be."""
    return array if sharding is None else jax.device_put(array, sharding)
