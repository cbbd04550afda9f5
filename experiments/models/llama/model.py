"""Llama (Touvron et al., 2023), Mistral, Qwen 2 and Qwen 3 as plain Flax modules.

The layers are one stack that is scanned over. Every kernel is the transpose of a linear layer of
Hugging Face's model, with an axis for heads and one for the dimensions of a head.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from experiments.models.attention import (
    Heads,
    Places,
    Scoring,
    Tokens,
    attention,
    in_read_order,
    in_segment_so_far,
)
from experiments.models.cache import Cache, looked_at
from experiments.models.layers import (
    GatedFeedForward,
    Hidden,
    Logits,
    RMSNorm,
    cut_along,
    embedded,
    rows_of,
    stack_of,
)
from experiments.models.llama.config import LlamaConfig
from experiments.models.llama.rotary import rotary_angles, rotated

Angles = Float[Array, "batch length half"]
# What a layer hands on to the next one.
Carried = tuple[Hidden, Cache | None]


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
    ) -> Carried:
        config = self.config
        shared = config.num_key_value_heads
        query = self._heads("query", config.num_attention_heads, hidden)
        key, value = (self._heads(name, shared, hidden) for name in ("key", "value"))
        if config.has_head_norms:
            query = RMSNorm(config.rms_norm_eps, name="query_norm")(query)
            key = RMSNorm(config.rms_norm_eps, name="key_norm")(key)
        pair = in_read_order(rotated(key, angles)), in_read_order(value)
        looked = looked_at(pair, places, number, cache)
        seen = attention(
            rotated(query, angles),
            looked.pair,
            places,
            looked.places,
            Scoring(
                partial(in_segment_so_far, window=config.sliding_window), config.head_dim**-0.5
            ),
            in_order=looked.in_order,
        )
        out = nn.DenseGeneral(
            config.hidden_size, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="out"
        )
        return out(seen), looked.cache

    def _heads(self, name: str, count: int, hidden: Hidden) -> Heads:
        return nn.DenseGeneral(
            (count, self.config.head_dim),
            use_bias=self.config.has_biases,
            dtype=self.dtype,
            name=name,
        )(hidden)


class Layer(nn.Module):
    """Attention and a feed-forward layer, each of a normalised input and added to it."""

    config: LlamaConfig
    dtype: Any
    cut: PartitionSpec | None

    @nn.compact
    def __call__(
        self, carried: Carried, number: Array, places: Places, angles: Angles
    ) -> tuple[Carried, None]:
        hidden, cache = carried
        config = self.config
        attend = Attention(config, self.dtype, name="attention")
        normalised = RMSNorm(config.rms_norm_eps, name="attention_norm")(hidden)
        seen, cache = attend(normalised, places, angles, number, cache)
        hidden = cut_along(hidden + seen, self.cut)
        feed_forward = GatedFeedForward(config.intermediate_size, nn.silu, self.dtype, name="mlp")
        hidden = hidden + feed_forward(RMSNorm(config.rms_norm_eps, name="mlp_norm")(hidden))
        return (cut_along(hidden, self.cut), cache), None


class Llama(nn.Module):
    """Tokens in, the logits of the token that follows each of them out.

    Attributes:
      config: the settings.
      dtype: the dtype of its products and activations; parameters are cast to it.
      remat: whether the backward pass computes each layer again instead of keeping what is inside.
      cut: how hidden states between layers are cut over the mesh at hand, along batch, length and
        width; unless given, the compiler decides.
      prompt_length: how many vectors of a soft prompt there are, which are the tokens -1, -2, ...
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: bool = False
    cut: PartitionSpec | None = None
    prompt_length: int = 0

    def setup(self) -> None:
        """Makes the layers."""
        config = self.config
        self.embed = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype)
        self.prompt = None
        if self.prompt_length:
            shape = self.prompt_length, config.hidden_size
            self.prompt = self.param("soft_prompt", nn.initializers.zeros, shape)
        stack = stack_of(Layer, config.num_hidden_layers, shared=2, remat=self.remat)
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
          positions: the place of each in its text, where a later one is greater; 0, 1, ... unless
            given.
          segments: which of several texts in a row it belongs to, from 1 on, and 0 for padding;
            one text unless given.
        """
        return self._run(tokens, Places.of(tokens, positions, segments), None)[0]

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
          positions: as for `hidden_states`; unless given, they follow those in the cache.
          segments: as for `hidden_states`.
        """
        if positions is None:
            positions = cache.following_positions(tokens)
        places = Places.of(tokens, positions, segments)
        hidden, longer = self._run(tokens, places, cache.with_places(places))
        assert longer is not None
        return hidden, longer.longer(places)

    def embedded(self, tokens: Tokens) -> Hidden:
        """Returns the vectors that the first layer reads."""
        return embedded(tokens, self.embed, self.prompt)

    def logits(self, hidden: Hidden) -> Logits:
        """Returns the logits of hidden states."""
        return self.embed.attend(hidden) if self.config.tie_word_embeddings else self.head(hidden)

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """Returns a cache with room for so many tokens of each row."""
        config = self.config
        return Cache.empty(
            layers=config.num_hidden_layers,
            batch=batch,
            capacity=capacity,
            heads=config.num_key_value_heads,
            dim=config.head_dim,
            dtype=self.dtype,
        )

    def read_prompts(
        self, tokens: Tokens, lengths: Int[Array, " batch"], new_tokens: int
    ) -> tuple[Float[Array, "batch vocabulary"], Cache]:
        """Returns the logits of the token after each prompt; see `generation.Writing`."""
        batch, width = tokens.shape
        is_prompt = (jnp.arange(width) < lengths[:, None]).astype(jnp.int32)
        hidden, cache = self.with_cache(
            tokens, self.empty_cache(batch, width + new_tokens), segments=is_prompt
        )
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        return self.logits(last)[:, 0], cache.with_following(lengths)

    def read_token(
        self, token: Int[Array, " batch"], cache: Cache
    ) -> tuple[Float[Array, "batch vocabulary"], Cache]:
        """Returns the logits of what follows one more token; see `generation.Writing`."""
        hidden, cache = self.with_cache(token[:, None], cache)
        return self.logits(hidden)[:, 0], cache

    def _run(self, tokens: Tokens, places: Places, cache: Cache | None) -> Carried:
        angles = rotary_angles(self.config, places.positions)
        numbers = jnp.arange(self.config.num_hidden_layers)
        carried = cut_along(self.embedded(tokens), self.cut), cache
        (hidden, cache), _ = self.layers(carried, numbers, places, angles)
        return cut_along(self.norm(hidden), rows_of(self.cut)), cache
