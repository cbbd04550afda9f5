"""LoRA dropout: on the adapter's input only, with an independent mask for each use."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Draws a new mask each time that an adapter's input passes.

    Attributes:
      rate: the probability with which an element is dropped.
      key: the key of the body that is being evaluated.
      uses: counts the masks that this body has drawn.
    """

    rate: float
    key: PRNGKeyArray
    uses: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def next_key(self) -> PRNGKeyArray:
        """Returns a key that no other use in this body has."""
        return jax.random.fold_in(self.key, next(self.uses))

    def __call__(self, x: Array) -> Array:
        """Returns x with elements dropped; the kept ones count 1 / (1 - rate) through the scale."""
        kept = jax.random.bernoulli(self.next_key(), 1 - self.rate, x.shape)
        return jnp.where(kept, x, jnp.zeros_like(x))

    def scaled(self, scale: Array) -> Array:
        """Returns an adapter's scale over 1 - rate: there it keeps the factors' precision."""
        return scale / jnp.asarray(1 - self.rate, scale.dtype)

    def with_key(self, key: PRNGKeyArray) -> "Dropout":
        """Returns the dropout of a body that has a key of its own."""
        return Dropout(self.rate, key)
