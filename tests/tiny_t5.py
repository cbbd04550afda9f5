"""Small random encoder-decoders: their settings, parameters and folders."""

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from experiments.models.names import huggingface_rules
from experiments.models.t5 import T5, T5Config
from experiments.models.t5.config import config_of
from lora_jax.exchange import huggingface
from tests.tiny_models import random_params

VOCABULARY, WIDTH, HIDDEN, HEADS, DIM, LAYERS = 300, 48, 80, 4, 8, 2

# Heads that are not as wide together as a hidden state, and few buckets for short texts.
ENTRIES: Mapping[str, Any] = MappingProxyType(
    {
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": DIM,
        "d_ff": HIDDEN,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 20,
        "layer_norm_epsilon": 1e-5,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
)
# What each version has that others don't.
CHANGES: dict[str, dict[str, Any]] = {
    "1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "flan": {
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "tie_word_embeddings": False,
        "num_decoder_layers": LAYERS + 1,
        "d_kv": WIDTH // HEADS,
    },
    "ul2": {
        "feed_forward_proj": "gated-silu",
        "dense_act_fn": "silu",
        "tie_word_embeddings": False,
        "num_decoder_layers": LAYERS - 1,
    },
}


def entries(version: str, **changes: Any) -> dict[str, Any]:
    """Returns what a `config.json` holds."""
    return {**ENTRIES, **CHANGES[version], **changes}


def config(version: str, **changes: Any) -> T5Config:
    return config_of(entries(version, **changes), "config.json")


@functools.cache
def params(version: str, *, seed: int = 0) -> Any:
    """Returns random parameters: norms around one, and queries so small that scores are moderate.

    Scores are not divided by √d_kv, so that with larger queries float32 would leave few digits.
    """
    settings = config(version)

    def leaf(path: Any, array: jax.Array) -> jax.Array:
        is_query = any(key.key == "query" for key in path)
        return array * settings.d_kv**-0.5 if is_query else array

    drawn = random_params(T5(settings), inputs=2, seed=seed)
    return jax.tree_util.tree_map_with_path(leaf, drawn)


def write_folder(path: Path, version: str, **options: Any) -> None:
    """Writes a folder in Hugging Face's format."""
    rules = huggingface_rules(config(version))
    huggingface.save(path, params(version), names=rules, config=entries(version), **options)


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, VOCABULARY, (batch, length), np.int32)


def decoder_tokens(batch: int = 2, length: int = 18, seed: int = 1) -> np.ndarray:
    """Returns tokens that begin as the decoder's do."""
    found = tokens(batch, length, seed)
    found[:, 0] = ENTRIES["decoder_start_token_id"]
    return found
