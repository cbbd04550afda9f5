"""The keys and values of the tokens that a model has read."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.models.llama.attention import Places, Shared, Tokens
from experiments.models.llama.config import LlamaConfig

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
      is_empty: whether it is known, while a program is traced, that there are none.
    """

    keys: Stack
    values: Stack
    places: Places
    length: Array
    is_empty: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, capacity: int, dtype: Any) -> "Cache":
        """Returns a cache with room for so many tokens of each example."""
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        zeros = jnp.zeros((config.num_hidden_layers, *shape), dtype)
        nowhere = jnp.zeros((batch, capacity), jnp.int32)
        length = jnp.zeros((), jnp.int32)
        return cls(zeros, zeros, Places(nowhere, nowhere), length, is_empty=True)

    def with_places(self, places: Places) -> "Cache":
        """Returns the cache with the places of tokens that follow; `with_layer` comes next."""

        def extended(old: Tokens, new: Tokens) -> Tokens:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.length, 1)

        return dataclasses.replace(self, places=jax.tree.map(extended, self.places, places))

    def with_layer(self, number: Array, key: Shared, value: Shared) -> "Cache":
        """Returns the cache with the keys and values of those tokens in one layer."""

        def written(stack: Stack, new: Shared) -> Stack:
            start = (number, 0, 0, self.length, 0)
            return jax.lax.dynamic_update_slice(stack, new.astype(stack.dtype)[None], start)

        return dataclasses.replace(
            self, keys=written(self.keys, key), values=written(self.values, value)
        )

    def layer(self, number: Array) -> tuple[Shared, Shared]:
        """Returns the keys and values of one layer, room included."""
        key, value = (
            jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)
            for stack in (self.keys, self.values)
        )
        return key, value

    def longer(self, count: int) -> "Cache":
        """Returns the cache when all layers have so many tokens more."""
        return dataclasses.replace(self, length=self.length + count, is_empty=False)
