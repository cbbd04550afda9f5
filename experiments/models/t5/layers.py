"""The layers of encoder and decoder."""

import dataclasses
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array

from experiments.models.attention import (
    Pair,
    Places,
    Scoring,
    attention,
    in_read_order,
    in_segment,
    in_segment_so_far,
)
from experiments.models.cache import Cache, looked_at
from experiments.models.layers import (
    ACTIVATIONS,
    Activation,
    GatedFeedForward,
    Hidden,
    RMSNorm,
    cut_along,
)
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


# What a layer of the decoder hands on to the next one.
Carried = tuple[Hidden, Cache | None]
# The keys and values of what the decoder looks at, of one layer or stacked.
SourcePair = tuple[Array, Array]


class Attention(nn.Module):
    """Tokens look at others, or at those of the encoder, with several heads."""

    config: T5Config
    dtype: Any

    def setup(self) -> None:
        """Makes the four linear layers."""
        shape = self.config.num_heads, self.config.d_kv
        # In place of a division of scores by √d_kv.
        small = nn.initializers.variance_scaling(1 / self.config.d_kv, "fan_in", "truncated_normal")
        usual = nn.linear.default_kernel_init
        self.query, self.key, self.value = (
            nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype, kernel_init=init)
            for init in (small, usual, usual)
        )
        self.out = nn.DenseGeneral(
            self.config.d_model, axis=(-2, -1), use_bias=False, dtype=self.dtype
        )

    def pair(self, hidden: Hidden) -> Pair:
        """Returns the keys and the values of what is looked at."""
        return in_read_order(self.key(hidden)), in_read_order(self.value(hidden))

    def __call__(
        self,
        hidden: Hidden,
        pair: Pair,
        queries: Places,
        keys: Places,
        scoring: Scoring,
        *,
        in_order: bool = False,
    ) -> Hidden:
        query = self.query(hidden)
        return self.out(attention(query, pair, queries, keys, scoring, in_order=in_order))


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
    cut: PartitionSpec | None

    @nn.compact
    def __call__(
        self, hidden: Hidden, known: None, places: Places, by_difference: ByDifference
    ) -> tuple[Hidden, None]:
        attend = Attention(self.config, self.dtype, name="attention")
        normalised = _norm(self.config, "attention_norm")(hidden)
        seen = attend(
            normalised,
            attend.pair(normalised),
            places,
            places,
            _scoring(in_segment, bias=bias_of(by_difference)),
        )
        hidden = cut_along(hidden + seen, self.cut)
        feed_forward = _feed_forward(self.config, self.dtype)
        hidden = hidden + feed_forward(_norm(self.config, "mlp_norm")(hidden))
        return cut_along(hidden, self.cut), None


class DecoderLayer(nn.Module):
    """The same with attention to the encoder in between."""

    config: T5Config
    dtype: Any
    cut: PartitionSpec | None

    @nn.compact
    def __call__(
        self,
        carried: Carried,
        own: tuple[Array, SourcePair | None],
        places: Places,
        by_difference: ByDifference,
        source: Source,
    ) -> tuple[Carried, SourcePair | None]:
        (hidden, cache), (number, known) = carried, own
        attend = Attention(self.config, self.dtype, name="attention")
        normalised = _norm(self.config, "attention_norm")(hidden)
        looked = looked_at(attend.pair(normalised), places, number, cache)
        seen = attend(
            normalised,
            looked.pair,
            places,
            looked.places,
            _scoring(in_segment_so_far, bias=bias_of(by_difference)),
            in_order=looked.in_order,
        )
        hidden = cut_along(hidden + seen, self.cut)
        look = Attention(self.config, self.dtype, name="cross_attention")
        normalised = _norm(self.config, "cross_attention_norm")(hidden)
        pair = look.pair(source.hidden) if source.hidden is not None else known
        seen = look(normalised, pair, places, source.places, _scoring(in_segment))
        hidden = cut_along(hidden + seen, self.cut)
        feed_forward = _feed_forward(self.config, self.dtype)
        hidden = hidden + feed_forward(_norm(self.config, "mlp_norm")(hidden))
        return (cut_along(hidden, self.cut), looked.cache), None if cache is None else pair


# Scores are not divided by √d_kv: the initial queries of T5 are as much smaller.
_scoring = partial(Scoring, scale=1.0)


def _norm(config: T5Config, name: str) -> RMSNorm:
    return RMSNorm(config.layer_norm_epsilon, name=name)


def _feed_forward(config: T5Config, dtype: Any) -> nn.Module:
    kind = GatedFeedForward if config.is_gated_act else FeedForward
    return kind(config.d_ff, ACTIVATIONS[config.dense_act_fn], dtype, name="mlp")
