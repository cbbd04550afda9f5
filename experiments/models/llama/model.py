"""Llama (Touvron et al., 2023), Mistral, Qwen 2 and Qwen 3 as plain Flax modules.

The layers are one stack that is scanned over. Every kernel is the transpose of a linear layer of
Hugging Face's model, with an axis for heads and one for the dimensions of a head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from experiments.models.llama.attention import (
    Heads,
    Places,
    Tokens,
    attention,
    rotary_angles,
    rotated,
)
from experiments.models.llama.config import LlamaConfig

Hidden = Float[Array, "batch length width"]
Logits = Float[Array, "batch length vocabulary"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of the tokens so far, for all layers.

    Attributes:
      keys: (layers, batch, capacity, heads, dim).
      values: the same for values.
      places: where the tokens are; segment 0 where there is none yet.
      length: how many tokens there are.
    """

    keys: Float[Array, "layers batch capacity heads dim"]
    values: Float[Array, "layers batch capacity heads dim"]
    places: Places
    length: Array

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, capacity: int, dtype: Any) -> "Cache":
        """Returns a cache with room for so many tokens of each example."""
        shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
        zeros = jnp.zeros((config.num_hidden_layers, *shape), dtype)
        nowhere = jnp.zeros((batch, capacity), jnp.int32)
        return cls(zeros, zeros, Places(nowhere, nowhere), jnp.zeros((), jnp.int32))


class RMSNorm(nn.Module):
    """Numbers over their root mean square, times a scale, computed in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*shape width"]) -> Float[Array, "*shape width"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        wide = x.astype(jnp.float32)
        mean = jnp.square(wide).mean(axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean + self.epsilon)).astype(x.dtype) * scale.astype(x.dtype)


class Attention(nn.Module):
    """Every token looks at those before it, with several heads that share keys and values."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        hidden: Hidden,
        places: Places,
        angles: Float[Array, "batch length half"],
        keys_at: Places,
        cached: tuple[Heads, Heads, Array] | None,
    ) -> tuple[Hidden, tuple[Heads, Heads]]:
        config = self.config
        shared = config.num_key_value_heads
        query = self._heads("query", config.num_attention_heads, hidden)
        key, value = (self._heads(name, shared, hidden) for name in ("key", "value"))
        if config.has_head_norms:
            query = RMSNorm(config.rms_norm_eps, name="query_norm")(query)
            key = RMSNorm(config.rms_norm_eps, name="key_norm")(key)
        query, key = rotated(query, angles), rotated(key, angles)
        if cached is not None:
            keys, values, start = cached
            key = jax.lax.dynamic_update_slice_in_dim(keys, key.astype(keys.dtype), start, 1)
            value = jax.lax.dynamic_update_slice_in_dim(
                values, value.astype(values.dtype), start, 1
            )
        seen = attention(query, key, value, places, keys_at, config.sliding_window)
        out = nn.DenseGeneral(
            config.hidden_size, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="out"
        )
        return out(seen), (key, value)

    def _heads(self, name: str, count: int, hidden: Hidden) -> Heads:
        return nn.DenseGeneral(
            (count, self.config.head_dim),
            use_bias=self.config.has_biases,
            dtype=self.dtype,
            name=name,
        )(hidden)


class FeedForward(nn.Module):
    """A gated feed-forward layer: down(silu(gate x) · up x) (Shazeer, GLU Variants, 2020)."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        gate, up = (
            nn.Dense(self.config.intermediate_size, use_bias=False, dtype=self.dtype, name=name)
            for name in ("gate", "up")
        )
        down = nn.Dense(self.config.hidden_size, use_bias=False, dtype=self.dtype, name="down")
        return down(nn.silu(gate(hidden)) * up(hidden))


def cut_along(hidden: Hidden, cut: PartitionSpec | None) -> Hidden:
    """Returns hidden states cut over the mesh at hand, or as they are without a cut."""
    return hidden if cut is None else jax.lax.with_sharding_constraint(hidden, cut)


class Layer(nn.Module):
    """Attention and a feed-forward layer, each of a normalised input and added to it."""

    config: LlamaConfig
    dtype: Any
    cut: PartitionSpec | None

    @nn.compact
    def __call__(
        self,
        hidden: Hidden,
        cached: tuple[Heads, Heads] | None,
        places: Places,
        angles: Float[Array, "batch length half"],
        keys_at: Places,
        start: Array | None,
    ) -> tuple[Hidden, tuple[Heads, Heads] | None]:
        epsilon = self.config.rms_norm_eps
        attend = Attention(self.config, self.dtype, name="attention")
        normalised = RMSNorm(epsilon, name="attention_norm")(hidden)
        in_cache = None if cached is None or start is None else (*cached, start)
        seen, pair = attend(normalised, places, angles, keys_at, in_cache)
        hidden = cut_along(hidden + seen, self.cut)
        feed_forward = FeedForward(self.config, self.dtype, name="mlp")
        hidden = hidden + feed_forward(RMSNorm(epsilon, name="mlp_norm")(hidden))
        return cut_along(hidden, self.cut), None if cached is None else pair


class Llama(nn.Module):
    """Tokens in, the logits of the token that follows each of them out.

    Attributes:
      config: the settings.
      dtype: the dtype of its products and activations; parameters are cast to it.
      remat: whether the backward pass computes each layer again instead of keeping what is inside.
      cut: how hidden states between layers are cut over the mesh at hand, along batch, length and
        width; unless given, the compiler decides.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: bool = False
    cut: PartitionSpec | None = None

    def setup(self) -> None:
        """Makes the layers."""
        config = self.config
        self.embed = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype)
        stack: Any = nn.scan(
            nn.remat(Layer, prevent_cse=False) if self.remat else Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *[nn.broadcast] * 4),
            length=config.num_hidden_layers,
        )
        self.layers = stack(config, self.dtype, self.cut)
        self.norm = RMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = nn.Dense(config.vocab_size, use_bias=False, dtype=self.dtype)

    def __call__(
        self, tokens: Tokens, positions: Tokens | None = None, segments: Tokens | None = None
    ) -> Logits:
        """Returns logits; arguments as for `hidden_states`."""
        return self.logits(self.hidden_states(tokens, positions, segments))

    def hidden_states(
        self, tokens: Tokens, positions: Tokens | None = None, segments: Tokens | None = None
    ) -> Hidden:
        """Returns the last hidden states, of which `logits` makes logits.

        Args:
          tokens: the tokens.
          positions: the place of each in its text; 0, 1, ... unless given.
          segments: which of several texts in a row it belongs to, from 1 on, and 0 for padding;
            one text unless given.
        """
        return self._run(tokens, positions, segments, None)[0]

    def with_cache(
        self,
        tokens: Tokens,
        cache: Cache,
        positions: Tokens | None = None,
        segments: Tokens | None = None,
    ) -> tuple[Hidden, Cache]:
        """Returns the hidden states of tokens that follow those in a cache, and the longer cache.

        Args:
          tokens: the tokens; with those in the cache no more than its capacity.
          cache: the keys and values of those before.
          positions: as for `hidden_states`; unless given, they follow the number of those before.
          segments: as for `hidden_states`.
        """
        if positions is None:
            positions = jnp.broadcast_to(cache.length + jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, longer = self._run(tokens, positions, segments, cache)
        assert longer is not None
        return hidden, longer

    def logits(self, hidden: Hidden) -> Logits:
        """Returns the logits of hidden states."""
        return self.embed.attend(hidden) if self.config.tie_word_embeddings else self.head(hidden)

    @classmethod
    def shapes(cls, config: LlamaConfig, dtype: Any) -> Any:
        """Returns the shapes of the parameters, all of one dtype."""
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        shapes = jax.eval_shape(cls(config).init, jax.random.key(0), tokens)["params"]
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)

    @property
    def _cut_of_rows(self) -> PartitionSpec | None:
        """That of the last hidden states, of which any may be asked for: along the batch alone."""
        return None if self.cut is None else PartitionSpec(self.cut[0])

    def _run(
        self, tokens: Tokens, positions: Tokens | None, segments: Tokens | None, cache: Cache | None
    ) -> tuple[Hidden, Cache | None]:
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        places = Places(positions, jnp.ones_like(tokens) if segments is None else segments)
        angles = rotary_angles(self.config, positions)
        if cache is None:
            embedded = cut_along(self.embed(tokens), self.cut)
            hidden, _ = self.layers(embedded, None, places, angles, places, None)
            return cut_along(self.norm(hidden), self._cut_of_rows), None
        start = cache.length

        def extended(old: Tokens, new: Tokens) -> Tokens:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 1)

        keys_at = jax.tree.map(extended, cache.places, places)
        hidden, (keys, values) = self.layers(
            self.embed(tokens), (cache.keys, cache.values), places, angles, keys_at, start
        )
        longer = Cache(keys, values, keys_at, start + tokens.shape[1])
        return self.norm(hidden), longer
