"""T5 (Raffel et al., 2020), T5 1.1 and FLAN-T5 as plain Flax modules, without dropout.

The layers of encoder and decoder are a stack each, which is scanned over. Every kernel is the
transpose of a linear layer of Hugging Face's model; those of attention have an axis for heads and
one for the dimensions of a head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from experiments.models.attention import Places, Tokens
from experiments.models.cache import Cache
from experiments.models.layers import (
    Hidden,
    Logits,
    RMSNorm,
    cut_along,
    embedded,
    rows_of,
    stack_of,
)
from experiments.models.t5.config import T5Config
from experiments.models.t5.layers import DecoderLayer, EncoderLayer, Source, SourcePair
from experiments.models.t5.relative import ByDifference, buckets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """What the decoder keeps between two tokens.

    Attributes:
      decoded: the keys and values of the tokens so far.
      source: those of what it looks at, for all layers, computed once; None before the first token.
      source_places: where the encoder's tokens are.
    """

    decoded: Cache
    source: SourcePair | None
    source_places: Places


class _Stack(nn.Module):
    """Layers, what their heads add to scores, and a norm behind the last one."""

    config: T5Config
    dtype: Any
    remat: bool
    cut: PartitionSpec | None

    def _make(self, layer: type[nn.Module], count: int, *, shared: int) -> None:
        config = self.config
        self.relative_bias = nn.Embed(
            config.relative_attention_num_buckets, config.num_heads, dtype=jnp.float32
        )
        self.layers = stack_of(layer, count, shared=shared, remat=self.remat)(
            config, self.dtype, self.cut
        )
        self.norm = RMSNorm(config.layer_norm_epsilon)

    def _by_difference(self, *, both_directions: bool) -> ByDifference:
        rows = buckets(self.config, both_directions=both_directions)
        return self.relative_bias(jnp.asarray(rows))


class Encoder(_Stack):
    """The stack whose tokens see all of their text."""

    def setup(self) -> None:
        """Makes the layers."""
        self._make(EncoderLayer, self.config.num_layers, shared=2)

    def __call__(self, hidden: Hidden, places: Places) -> Hidden:
        by_difference = self._by_difference(both_directions=True)
        hidden, _ = self.layers(cut_along(hidden, self.cut), None, places, by_difference)
        return cut_along(self.norm(hidden), rows_of(self.cut))


class Decoder(_Stack):
    """The stack whose tokens see those before them, and the encoder's of the same segment."""

    def setup(self) -> None:
        """Makes the layers."""
        self._make(DecoderLayer, self.config.num_decoder_layers, shared=3)

    def __call__(
        self,
        hidden: Hidden,
        places: Places,
        source: Source,
        cache: Cache | None = None,
        known: SourcePair | None = None,
    ) -> tuple[Hidden, Cache | None, SourcePair | None]:
        by_difference = self._by_difference(both_directions=False)
        numbers = jnp.arange(self.config.num_decoder_layers)
        (hidden, cache), pairs = self.layers(
            (cut_along(hidden, self.cut), cache), (numbers, known), places, by_difference, source
        )
        return cut_along(self.norm(hidden), rows_of(self.cut)), cache, pairs


class T5(nn.Module):
    """A text in, and the tokens so far of another; the logits of the token after each of them out.

    Attributes:
      config: the settings.
      dtype: the dtype of its products and activations; parameters are cast to it.
      remat: whether the backward pass computes each layer again instead of keeping what is inside.
      cut: how hidden states between layers are cut over the mesh at hand, along batch, length and
        width; unless given, the compiler decides.
      prompt_length: how many vectors of a soft prompt there are, which are the tokens -1, -2, ...
    """

    config: T5Config
    dtype: Any = jnp.float32
    remat: bool = False
    cut: PartitionSpec | None = None
    prompt_length: int = 0

    def setup(self) -> None:
        """Makes the embedding, the two stacks and the output layer."""
        config = self.config
        # As large as T5's: a tied output layer divides by √d_model.
        init = nn.initializers.normal(1.0)
        self.embed = nn.Embed(
            config.vocab_size, config.d_model, dtype=self.dtype, embedding_init=init
        )
        self.prompt = None
        if self.prompt_length:
            shape = self.prompt_length, config.d_model
            self.prompt = self.param("soft_prompt", nn.initializers.zeros, shape)
        self.encoder = Encoder(config, self.dtype, self.remat, self.cut)
        self.decoder = Decoder(config, self.dtype, self.remat, self.cut)
        if not config.tie_word_embeddings:
            self.head = nn.Dense(config.vocab_size, use_bias=False, dtype=self.dtype)

    def __call__(
        self,
        inputs: Tokens,
        tokens: Tokens,
        input_places: Places | None = None,
        places: Places | None = None,
    ) -> Logits:
        """Returns logits; arguments as for `hidden_states`."""
        return self.logits(self.hidden_states(inputs, tokens, input_places, places))

    def hidden_states(
        self,
        inputs: Tokens,
        tokens: Tokens,
        input_places: Places | None = None,
        places: Places | None = None,
    ) -> Hidden:
        """Returns the decoder's last hidden states, of which `logits` makes logits.

        Args:
          inputs: the tokens that the encoder reads.
          tokens: those that the decoder reads, of which the first one of a text is
            `decoder_start_token_id`.
          input_places: where the encoder's tokens are; unless given, a row is one text.
          places: where the decoder's tokens are, which look at the encoder's of the same segment;
            unless given, a row is one text.
        """
        source = self.encode(inputs, input_places)
        places = Places.of(tokens, None, None) if places is None else places
        hidden, *_ = self.decoder(self.embed(tokens), places, source)
        return hidden

    def encode(self, inputs: Tokens, places: Places | None = None) -> Source:
        """Returns what the decoder looks at; arguments as for `hidden_states`."""
        places = Places.of(inputs, None, None) if places is None else places
        return Source(self.encoder(self.embedded(inputs), places), places)

    def with_cache(
        self, tokens: Tokens, cache: DecoderCache, source: Hidden | None = None
    ) -> tuple[Hidden, DecoderCache]:
        """Returns the hidden states of tokens that follow those in a cache, and the longer cache.

        Args:
          tokens: the tokens; with those in the cache no more than its capacity.
          cache: what is known from those before.
          source: the encoder's last hidden states, for the first tokens alone.
        """
        decoded = cache.decoded
        places = Places.of(tokens, decoded.following_positions(tokens), None)
        hidden, longer, known = self.decoder(
            self.embed(tokens),
            places,
            Source(source, cache.source_places),
            decoded.with_places(places),
            cache.source,
        )
        assert longer is not None
        return hidden, DecoderCache(longer.longer(places), known, cache.source_places)

    def embedded(self, tokens: Tokens) -> Hidden:
        """Returns the vectors that the first layer reads."""
        return embedded(tokens, self.embed, self.prompt)

    def logits(self, hidden: Hidden) -> Logits:
        """Returns the logits of hidden states."""
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        return self.embed.attend(hidden) if self.config.tie_word_embeddings else self.head(hidden)

    def empty_cache(self, batch: int, capacity: int, source_places: Places) -> DecoderCache:
        """Returns a cache with room for so many tokens of the decoder in each row."""
        config = self.config
        decoded = Cache.empty(
            layers=config.num_decoder_layers,
            batch=batch,
            capacity=capacity,
            heads=config.num_heads,
            dim=config.d_kv,
            dtype=self.dtype,
        )
        return DecoderCache(decoded, None, source_places)

    def read_prompts(
        self, tokens: Tokens, lengths: Int[Array, " batch"], new_tokens: int
    ) -> tuple[Float[Array, "batch vocabulary"], DecoderCache]:
        """Returns the logits of the first token of each answer; see `generation.Writing`."""
        batch, width = tokens.shape
        is_prompt = (jnp.arange(width) < lengths[:, None]).astype(jnp.int32)
        source = self.encode(tokens, Places.of(tokens, None, is_prompt))
        start = jnp.full((batch, 1), self.config.decoder_start_token_id, tokens.dtype)
        cache = self.empty_cache(batch, 1 + new_tokens, source.places)
        hidden, cache = self.with_cache(start, cache, source.hidden)
        return self.logits(hidden)[:, 0], cache

    def read_token(
        self, token: Int[Array, " batch"], cache: DecoderCache
    ) -> tuple[Float[Array, "batch vocabulary"], DecoderCache]:
        """Returns the logits of what follows one more token; see `generation.Writing`."""
        hidden, cache = self.with_cache(token[:, None], cache)
        return self.logits(hidden)[:, 0], cache
