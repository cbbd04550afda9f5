"""The keys and values of tokens that were read already."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.models.attention import Pair, Places, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of the tokens so far, for all layers.

    Attributes:
      keys: (layers, batch, capacity, heads, dim).
      values: the same for values.
      places: where the tokens are; segment 0 where there is none yet.
      length: how many tokens there are.
      following: the position of the token that follows in each row.
    """

    keys: Float[Array, "layers batch capacity heads dim"]
    values: Float[Array, "layers batch capacity heads dim"]
    places: Places
    length: Int[Array, ""]
    following: Int[Array, "batch"]

    @classmethod
    def empty(
        cls, *, layers: int, batch: int, capacity: int, heads: int, dim: int, dtype: Any
    ) -> "Cache":
        """Returns a cache with room for so many tokens of each row."""
        zeros = jnp.zeros((layers, batch, capacity, heads, dim), dtype)
        nowhere = jnp.zeros((batch, capacity), jnp.int32)
        nothing = jnp.zeros((), jnp.int32)
        return cls(zeros, zeros, Places(nowhere, nowhere), nothing, jnp.zeros(batch, jnp.int32))

    @property
    def pairs(self) -> tuple[Array, Array]:
        """The keys and the values, along whose first axis layers are scanned over."""
        return self.keys, self.values

    def following_positions(self, tokens: Tokens) -> Tokens:
        """Returns the positions of tokens that follow those in the cache."""
        return self.following[:, None] + jnp.arange(tokens.shape[1])

    def places_with(self, places: Places) -> Places:
        """Returns where all tokens are, those in the cache and those that follow them."""
        return jax.tree.map(lambda old, new: _extended(old, new, self.length), self.places, places)

    def extended(self, pairs: tuple[Array, Array], places: Places) -> "Cache":
        """Returns the longer cache.

        Args:
          pairs: the keys and values of all layers, as `with_cached` returns those of each.
          places: where the tokens are that follow.
        """
        count = places.positions.shape[1]
        following = places.positions[:, -1] + 1
        return Cache(*pairs, self.places_with(places), self.length + count, following)

    def with_following(self, positions: Int[Array, "batch"]) -> "Cache":
        """Returns the cache with other positions of the tokens that follow."""
        return dataclasses.replace(self, following=positions)


def with_cached(pair: Pair, cached: Pair, start: Int[Array, ""]) -> Pair:
    """Returns the keys and values of a layer in its cache, those of new tokens behind the others.

    Args:
      pair: the keys and values of the new tokens.
      cached: the layer's cache.
      start: how many tokens it holds.
    """
    key, value = (_extended(old, new, start) for old, new in zip(cached, pair, strict=True))
    return key, value


def _extended(old: Array, new: Array, start: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 1)
