"""The settings of an encoder-decoder, as `config.json` holds them."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from experiments.common.errors import InputError
from experiments.models.entries import (
    check_positive,
    check_supported,
    check_unquantized,
    entry,
    without_none,
)
from experiments.models.layers import ACTIVATIONS

# Entries that ask for what this model does not compute, with the only value that it supports.
_SUPPORTED = {"model_type": "t5", "is_encoder_decoder": True}
_GATED = "gated-"
# What transformers takes "gelu" for where it gates.
_GATED_GELU = "gelu_new"
# With fewer, one direction of the encoder would have no bucket for a distance of its own.
_FEWEST_BUCKETS = 4


@dataclass(frozen=True)
class T5Config:
    """The settings of one model; names and defaults are Hugging Face's.

    Attributes:
      model_type: the architecture.
      d_model: the numbers of a hidden state.
      d_kv: the size of a head.
      d_ff: the numbers inside of a feed-forward layer.
      num_layers: the layers of the encoder.
      num_decoder_layers: the layers of the decoder; as many unless the file says it.
      relative_attention_num_buckets: how many distances are told apart.
      relative_attention_max_distance: from which distance on none are.
      dense_act_fn: the activation of the feed-forward layers.
      is_gated_act: whether they are gated.
      decoder_start_token_id: the token with which the decoder begins.
      tie_word_embeddings: whether the output layer is the embedding.
      scale_decoder_outputs: whether hidden states are divided by √d_model before it.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    dense_act_fn: str
    is_gated_act: bool
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    decoder_start_token_id: int = 0
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    model_type: str = "t5"


def config_of(entries: Mapping[str, Any], source: str) -> T5Config:
    """Returns the settings in the entries of a `config.json`.

    Args:
      entries: the entries.
      source: where they are from, for errors.

    Raises:
      InputError: an entry is missing, or asks for what this model does not compute; it is named.
    """
    check_unquantized(entries, source)
    check_supported(entries, _SUPPORTED, source)
    act, is_gated = _feed_forward(entries.get("feed_forward_proj", "relu"), source)
    # A model of version 1.0 divides, and its output layer is the embedding; others do neither.
    is_tied = entries.get("tie_word_embeddings", True)
    given = {
        "num_decoder_layers": entries.get("num_layers"),
        "dense_act_fn": act,
        "scale_decoder_outputs": is_tied,
        "decoder_start_token_id": entries.get("pad_token_id", 0),
        **without_none(entries),
        "is_gated_act": is_gated,
    }
    config = T5Config(
        **{
            field.name: entry(given, field.name, field.type, source)
            for field in fields(T5Config)
            if field.name in given or field.default is MISSING
        }
    )
    _check_consistent(config, source)
    return config


def _feed_forward(projection: Any, source: str) -> tuple[str, bool]:
    """Returns the activation of the feed-forward layers, and whether they are gated."""
    is_gated = isinstance(projection, str) and projection.startswith(_GATED)
    act = projection.removeprefix(_GATED) if is_gated else projection
    if act not in ACTIVATIONS:
        raise InputError(
            f"{source}: feed_forward_proj is {projection!r}, expected one of "
            f"{', '.join(ACTIVATIONS)}, or one of these after {_GATED!r}"
        )
    return (_GATED_GELU if is_gated and act == "gelu" else act), is_gated


def _check_consistent(config: T5Config, source: str) -> None:
    check_positive(config, source, zero_allowed=("decoder_start_token_id",))
    if config.dense_act_fn not in ACTIVATIONS:
        raise InputError(
            f"{source}: dense_act_fn is {config.dense_act_fn!r}, expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    buckets, farthest = (
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
    )
    if buckets < _FEWEST_BUCKETS:
        raise InputError(
            f"{source}: relative_attention_num_buckets is {buckets}, expected {_FEWEST_BUCKETS} "
            "or more"
        )
    if farthest <= buckets // 2:
        raise InputError(
            f"{source}: relative_attention_max_distance is {farthest}, expected more than "
            f"{buckets // 2}, half of relative_attention_num_buckets"
        )
    if config.decoder_start_token_id >= config.vocab_size:
        raise InputError(
            f"{source}: decoder_start_token_id is {config.decoder_start_token_id}, expected less "
            f"than vocab_size {config.vocab_size}"
        )
