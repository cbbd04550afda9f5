"""The keys and values of the tokens that a model has read."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.models.attention import Pair, Places, Shared, Tokens

Stack = Float[Array, "layers batch shared capacity dim"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of the tokens so far, for all layers.

    One array holds all layers: a loop over layers and tokens then writes into it, where it would
    copy arrays that are stacked.

    Attributes:
      keys: for each layer, in the order in which products read them.
      values: the same for values.
      places: where the tokens are; segment 0 where there is none yet.
      length: how many tokens there are.
      following: the position of the token that follows in each row.
      is_empty: whether it is known, while a program is traced, that there are none.
    """

    keys: Stack
    values: Stack
    places: Places
    length: Int[Array, ""]
    following: Int[Array, " batch"]
    is_empty: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(
        cls, *, layers: int, batch: int, capacity: int, heads: int, dim: int, dtype: Any
    ) -> "Cache":
        """Returns a cache with room for so many tokens of each row."""
        zeros = jnp.zeros((layers, batch, heads, capacity, dim), dtype)
        nowhere = jnp.zeros((batch, capacity), jnp.int32)
        nothing = jnp.zeros((), jnp.int32)
        return cls(
            keys=zeros,
            values=zeros,
            places=Places(nowhere, nowhere),
            length=nothing,
            following=jnp.zeros(batch, jnp.int32),
            is_empty=True,
        )

    def following_positions(self, tokens: Tokens) -> Tokens:
        """Returns the positions of tokens that follow those in the cache."""
        return self.following[:, None] + jnp.arange(tokens.shape[1])

    def with_following(self, positions: Int[Array, " batch"]) -> "Cache":
        """Returns the cache with other positions of the tokens that follow."""
        return dataclasses.replace(self, following=positions)

    def with_places(self, places: Places) -> "Cache":
        """Returns the cache with the places of tokens that follow; `with_layer` comes next."""

        def extended(old: Tokens, new: Tokens) -> Tokens:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.length, 1)

        return dataclasses.replace(self, places=jax.tree.map(extended, self.places, places))

    def with_layer(self, number: Array, pair: Pair) -> "Cache":
        """Returns the cache with the keys and values of those tokens in one layer."""

        def written(stack: Stack, new: Shared) -> Stack:
            start = (number, 0, 0, self.length, 0)
            return jax.lax.dynamic_update_slice(stack, new.astype(stack.dtype)[None], start)

        key, value = pair
        return dataclasses.replace(
            self, keys=written(self.keys, key), values=written(self.values, value)
        )

    def layer(self, number: Array) -> Pair:
        """Returns the keys and values of one layer, room included."""
        key, value = (
            jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)
            for stack in (self.keys, self.values)
        )
        return key, value

    def longer(self, places: Places) -> "Cache":
        """Returns the cache when all layers have the tokens at these places more."""
        count = places.positions.shape[1]
        return dataclasses.replace(
            self,
            length=self.length + count,
            following=places.positions[:, -1] + 1,
            is_empty=False,
        )


@dataclasses.dataclass(frozen=True)
class Looked:
    """What queries look at.

    Attributes:
      pair: the keys and values.
      places: where they are.
      in_order: whether they are those of the queries' own tokens.
      cache: the cache with them, if there is one.
    """

    pair: Pair
    places: Places
    in_order: bool
    cache: Cache | None


def looked_at(pair: Pair, places: Places, number: Array, cache: Cache | None) -> Looked:
    """Returns what tokens look at in one layer: themselves, and those in the cache before them.

    Args:
      pair: the tokens' own keys and values.
      places: where the tokens are.
      number: the number of the layer.
      cache: the cache, with the places of the tokens; None if there is none.
    """
    if cache is None:
        return Looked(pair, places, in_order=True, cache=None)
    cache = cache.with_layer(number, pair)
    if cache.is_empty:
        return Looked(pair, places, in_order=True, cache=cache)
    return Looked(cache.layer(number), cache.places, in_order=False, cache=cache)
