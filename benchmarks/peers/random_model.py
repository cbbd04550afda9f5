"""Language models of random weights in the sizes of published ones: speed asks for no more."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.models.llama.config import config_of
from experiments.models.pretrained import LanguageModel
from experiments.models.shapes import ONE_TOKEN

# Source: `config.json` of meta-llama/Llama-3.2-1B on Hugging Face.
_ENTRIES: Mapping[str, Mapping[str, Any]] = {
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2_048,
        "intermediate_size": 8_192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8_192,
        },
        "tie_word_embeddings": True,
    },
}
SIZES = tuple(_ENTRIES)


def in_sizes_of(model: LanguageModel, name: str) -> LanguageModel:
    """Returns a model with the tokenizer of another, in the sizes of the published one."""
    return dataclasses.replace(model, config=config_of(_ENTRIES[name], name))


def random_params(model: LanguageModel, dtype: Any) -> Any:
    """Returns the weights with which its training from the start would begin."""

    @jax.jit
    def initial() -> Any:
        tokens = jnp.zeros(ONE_TOKEN.shape, ONE_TOKEN.dtype)
        params = model.network().init(jax.random.key(0), tokens)["params"]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return initial()
