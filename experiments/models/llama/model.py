"""Llama (Touvron et al., 2023), Mistral, Qwen 2 and Qwen 3 as plain Flax modules.

The layers are one stack that is scanned over. Every kernel is the transpose of a linear layer of
Hugging Face's model, with an axis for heads and one for the dimensions of a head.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from experiments.models.llama.attention import (
    Heads,
    Places,
    Tokens,
    attention,
    rotary_angles,
    rotated,
)
from experiments.models.llama.cache import Cache
from experiments.models.llama.config import LlamaConfig
from experiments.models.llama.recomputing import computed_again

Hidden = Float[Array, "batch length width"]
Angles = Float[Array, "batch length half"]
Logits = Float[Array, "batch length vocabulary"]


class RMSNorm(nn.Module):
    """Numbers over their root mean square, times a scale, computed in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*shape width"]) -> Float[Array, "*shape width"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])

        @computed_again
        def normalised(x: Array, scale: Array) -> Array:
            wide = x.astype(jnp.float32)
            mean = jnp.square(wide).mean(axis=-1, keepdims=True)
            over_root = wide * jax.lax.rsqrt(mean + self.epsilon)
            return over_root.astype(x.dtype) * scale.astype(x.dtype)

        return normalised(x, scale)


class Attention(nn.Module):
    """Every token looks at those before it, with several heads that share keys and values."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        hidden: Hidden,
        places: Places,
        angles: Angles,
        number: Array,
        cache: Cache | None,
    ) -> tuple[Hidden, Cache | None]:
        config = self.config
        shared = config.num_key_value_heads
        query = self._heads("query", config.num_attention_heads, hidden)
        key, value = (self._heads(name, shared, hidden) for name in ("key", "value"))
        if config.has_head_norms:
            query = RMSNorm(config.rms_norm_eps, name="query_norm")(query)
            key = RMSNorm(config.rms_norm_eps, name="key_norm")(key)
        query, key = rotated(query, angles), rotated(key, angles)
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        keys_at, in_order = places, True
        if cache is not None:
            cache = cache.with_layer(number, key, value)
            if not cache.is_empty:
                key, value = cache.layer(number)
                keys_at, in_order = cache.places, False
        window = config.sliding_window
        seen = attention(query, key, value, places, keys_at, window, in_order=in_order)
        out = nn.DenseGeneral(
            config.hidden_size, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="out"
        )
        return out(seen), cache

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

        @computed_again
        def gated(gate: Array, up: Array) -> Array:
            return nn.silu(gate) * up

        return down(gated(gate(hidden), up(hidden)))


class Layer(nn.Module):
    """Attention and a feed-forward layer, each of a normalised input and added to it."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        carried: tuple[Hidden, Cache | None],
        number: Array,
        places: Places,
        angles: Angles,
    ) -> tuple[tuple[Hidden, Cache | None], None]:
        hidden, cache = carried
        epsilon = self.config.rms_norm_eps
        attend = Attention(self.config, self.dtype, name="attention")
        normalised = RMSNorm(epsilon, name="attention_norm")(hidden)
        seen, cache = attend(normalised, places, angles, number, cache)
        hidden = hidden + seen
        feed_forward = FeedForward(self.config, self.dtype, name="mlp")
        hidden = hidden + feed_forward(RMSNorm(epsilon, name="mlp_norm")(hidden))
        return (hidden, cache), None


class Llama(nn.Module):
    """Tokens in, the logits of the token that follows each of them out.

    Attributes:
      config: the settings.
      dtype: the dtype of its products and activations; parameters are cast to it.
      remat: whether the backward pass computes each layer again instead of keeping what is inside.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Makes the layers."""
        config = self.config
        self.embed = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype)
        stack: Any = nn.scan(
            nn.remat(Layer, prevent_cse=False) if self.remat else Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=config.num_hidden_layers,
        )
        self.layers = stack(config, self.dtype)
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
          positions: the place of each in its text, where a later one is greater; 0, 1, ... unless
            given.
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

    def _run(
        self, tokens: Tokens, positions: Tokens | None, segments: Tokens | None, cache: Cache | None
    ) -> tuple[Hidden, Cache | None]:
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        places = Places(positions, jnp.ones_like(tokens) if segments is None else segments)
        angles = rotary_angles(self.config, positions)
        if cache is not None:
            cache = cache.with_places(places)
        numbers = jnp.arange(self.config.num_hidden_layers)
        carried = self.embed(tokens), cache
        (hidden, cache), _ = self.layers(carried, numbers, places, angles)
        if cache is not None:
            cache = cache.longer(tokens.shape[1])
        return self.norm(hidden), cache
