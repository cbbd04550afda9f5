"""Random keys for the weights of a tree."""

import zlib

import jax
from jaxtyping import PRNGKeyArray


def own_key(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """Returns the key that belongs to a name, such as a weight's path.

    It does not depend on what else draws from `key`, so a new target does not change the others.
    """
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
