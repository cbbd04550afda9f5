"""What is particular to a folder of T5 in Hugging Face's format."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.errors import InputError, as_input_error
from experiments.models.entries import CONFIG
from experiments.models.t5.config import T5Config, config_of
from lora_jax.exchange import huggingface

_EMBEDDING, _HEAD = "shared.weight", "lm_head.weight"
# The same numbers under other names.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# What the first checkpoints hold, and no model makes use of.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def config_of_folder(folder: Path, entries: Mapping[str, Any]) -> T5Config:
    """Returns the settings of the folder with these entries in its `config.json`.

    Raises:
      InputError: an entry is missing, or asks for what this model does not compute; it is named.
    """
    config = config_of(entries, str(folder / CONFIG))
    if "scale_decoder_outputs" not in entries:
        return config
    # transformers from version 5 on says of every T5 that its output layer is the embedding, and
    # writes the output layer where it is not.
    with as_input_error(), huggingface.tensors(folder) as tensors:
        return replace(config, tie_word_embeddings=_HEAD not in tensors)


def weights(tensors: Mapping[str, Any], config: T5Config) -> Mapping[str, Any]:
    """Returns the tensors without copies of the embedding, and without what is not used.

    Raises:
      InputError: what should be a copy is not; it is named.
    """
    copies = (*_COPIES, _HEAD) if config.tie_word_embeddings else _COPIES
    for name in copies:
        if name in tensors and _EMBEDDING in tensors and not _are_equal(tensors, name):
            raise InputError(
                f"{name} is not {_EMBEDDING}, of which it should be a copy; expected one embedding "
                "for encoder and decoder, and for the output layer where it is tied"
            )
    return {name: each for name, each in tensors.items() if name not in {*copies, _UNUSED}}


def _are_equal(tensors: Mapping[str, Any], name: str) -> bool:
    return np.array_equal(np.asarray(tensors[name]), np.asarray(tensors[_EMBEDDING]))
