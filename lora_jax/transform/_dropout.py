"""LoRA dropout: on the adapter's input only, with an independent mask for each use."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray

# A number is kept or dropped by 16 random bits: half a word of the generator's.
_LEVELS = 2**16


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Draws a mask for each use of an adapter, which depends on the key and the use's place alone.

    Attributes:
      rate: the probability with which an element is dropped, to the next multiple of 1/65536.
      key: the key of the body that is being evaluated.
      place: which equation of that body is being evaluated.
    """

    rate: float
    key: PRNGKeyArray
    place: int = 0

    def at(self, place: int) -> "Dropout":
        """Returns the dropout of another equation of the same body."""
        return dataclasses.replace(self, place=place)

    def key_of(self, use: int) -> PRNGKeyArray:
        """Returns the key of one use within this equation, which no other use in the body has."""
        key = jax.random.fold_in(self.key, self.place)
        return jax.random.fold_in(key, use) if use else key

    def dropped_out(self, x: Array, use: int) -> Array:
        """Returns x with elements dropped; the kept ones count 1 / (1 - rate) through the scale."""
        kept = _is_kept(self.key_of(use), x.shape, self._dropped_levels)
        return jnp.where(kept, x, jnp.zeros_like(x))

    def scaled(self, scale: Array) -> Array:
        """Returns an adapter's scale over 1 - rate: there it keeps the factors' precision."""
        kept = 1 - self._dropped_levels / _LEVELS
        return scale / jnp.asarray(kept, scale.dtype)

    def with_key(self, key: PRNGKeyArray) -> "Dropout":
        """Returns the dropout of a body that has a key of its own."""
        return Dropout(self.rate, key)

    @property
    def _dropped_levels(self) -> int:
        return min(round(self.rate * _LEVELS), _LEVELS - 1)


def _is_kept(key: PRNGKeyArray, shape: tuple[int, ...], dropped_levels: int) -> Bool[Array, "..."]:
    """Returns a mask in which each element is False with probability dropped_levels / 65536.

    Two elements share a word of 32 random bits. `jax.random.bits` of 16 would draw a word for each.
    """
    *before, last = shape or (1,)
    words = jax.random.bits(key, (*before, -(-last // 2)), jnp.uint32)
    halves = jnp.concatenate([words & jnp.uint32(_LEVELS - 1), words >> jnp.uint32(16)], axis=-1)
    return halves[..., :last].reshape(shape) >= jnp.uint32(dropped_levels)
