"""The layers of encoder and decoder."""

import dataclasses
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Int

from experiments.models.attention import (
    Bias,
    Pair,
    Places,
    Sees,
    attention,
    in_segment,
    in_segment_so_far,
)
from experiments.models.cache import with_cached
from experiments.models.layers import ACTIVATIONS, Activation, GatedFeedForward, Hidden, RMSNorm
from experiments.models.t5.config import T5Config
from experiments.models.t5.relative import ByDifference, bias_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """What the decoder looks at.

    Attributes:
      hidden: the encoder's last hidden states; None where their keys and values are known.
      places: where its tokens are.
    """

    hidden: Hidden | None
    places: Places


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Known:
    """What layers of the decoder know from the tokens before; stacked, or of one layer.

    Attributes:
      decoded: keys and values of the tokens of the decoder.
      source: keys and values of what it looks at; None before the first token.
    """

    decoded: tuple[Array, Array]
    source: tuple[Array, Array] | None


class Attention(nn.Module):
    """Tokens look at others, or at those of the encoder, with several heads."""

    config: T5Config
    dtype: Any

    def setup(self) -> None:
        """Makes the four linear layers."""
        shape = self.config.num_heads, self.config.d_kv
        self.query, self.key, self.value = (
            nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype) for _ in range(3)
        )
        self.out = nn.DenseGeneral(
            self.config.d_model, axis=(-2, -1), use_bias=False, dtype=self.dtype
        )

    def pair(self, hidden: Hidden) -> Pair:
        """Returns the keys and the values of what is looked at."""
        return self.key(hidden), self.value(hidden)

    def __call__(
        self,
        hidden: Hidden,
        pair: Pair,
        queries: Places,
        keys: Places,
        *,
        sees: Sees,
        bias: Bias | None = None,
    ) -> Hidden:
        query = self.query(hidden)
        # Scores are not divided by √d_kv: the initial queries of T5 are as much smaller.
        return self.out(attention(query, pair, queries, keys, sees=sees, scale=1.0, bias=bias))


class FeedForward(nn.Module):
    """A feed-forward layer: down(act(hidden x)).

    Attributes:
      width: how many numbers there are inside.
      act: the activation.
      dtype: the dtype of its products.
    """

    width: int
    act: Activation
    dtype: Any

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        hidden = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="hidden")(x)
        down = nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="down")
        return down(self.act(hidden))


class EncoderLayer(nn.Module):
    """Attention and a feed-forward layer, each of a normalised input and added to it."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: Hidden, known: None, places: Places, by_difference: ByDifference
    ) -> tuple[Hidden, None]:
        attend = Attention(self.config, self.dtype, name="attention")
        normalised = _norm(self.config, "attention_norm")(hidden)
        hidden = hidden + attend(
            normalised,
            attend.pair(normalised),
            places,
            places,
            sees=in_segment,
            bias=bias_of(by_difference),
        )
        feed_forward = _feed_forward(self.config, self.dtype)
        return hidden + feed_forward(_norm(self.config, "mlp_norm")(hidden)), None


class DecoderLayer(nn.Module):
    """The same with attention to the encoder in between."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(
        self,
        hidden: Hidden,
        known: Known | None,
        places: Places,
        by_difference: ByDifference,
        keys_at: Places,
        start: Int[Array, ""] | None,
        source: Source,
    ) -> tuple[Hidden, Known | None]:
        attend = Attention(self.config, self.dtype, name="attention")
        normalised = _norm(self.config, "attention_norm")(hidden)
        pair = attend.pair(normalised)
        if known is not None and start is not None:
            pair = with_cached(pair, known.decoded, start)
        hidden = hidden + attend(
            normalised,
            pair,
            places,
            keys_at,
            sees=in_segment_so_far,
            bias=bias_of(by_difference),
        )
        look = Attention(self.config, self.dtype, name="cross_attention")
        normalised = _norm(self.config, "cross_attention_norm")(hidden)
        source_pair = look.pair(source.hidden) if source.hidden is not None else known.source
        hidden = hidden + look(normalised, source_pair, places, source.places, sees=in_segment)
        feed_forward = _feed_forward(self.config, self.dtype)
        hidden = hidden + feed_forward(_norm(self.config, "mlp_norm")(hidden))
        return hidden, None if known is None else Known(pair, source_pair)


def _norm(config: T5Config, name: str) -> RMSNorm:
    return RMSNorm(config.layer_norm_epsilon, name=name)


def _feed_forward(config: T5Config, dtype: Any) -> nn.Module:
    kind = GatedFeedForward if config.is_gated_act else FeedForward
    return kind(config.d_ff, ACTIVATIONS[config.dense_act_fn], dtype, name="mlp")
