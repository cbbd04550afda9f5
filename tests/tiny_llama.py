"""Small random language models: their settings, parameters, folders and GGUF files."""

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments.models.llama import Llama, LlamaConfig, gguf_rules
from experiments.models.llama.config import ARCHITECTURES, config_of
from experiments.models.names import huggingface_rules
from lora_jax.exchange import huggingface
from tests.tiny_models import random_params

LAYERS, VOCABULARY, WIDTH, HIDDEN, HEADS, SHARED, DIM = 2, 300, 64, 96, 4, 2, 16

# A rank that is not a head's size, and one vocabulary for all.
ENTRIES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": SHARED,
        "head_dim": DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# What each architecture has that others don't, and both kinds of output layers.
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "rope_scaling": LLAMA3},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
}
assert set(CHANGES) == set(ARCHITECTURES)


def entries(model_type: str, **changes: Any) -> dict[str, Any]:
    """Returns what a `config.json` holds."""
    return {"model_type": model_type, **ENTRIES, **CHANGES[model_type], **changes}


def config(model_type: str, **changes: Any) -> LlamaConfig:
    return config_of(entries(model_type, **changes), "config.json")


@functools.cache
def params(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """Returns random parameters, norms around one."""
    return random_params(Llama(config(model_type, **changes)), inputs=1, seed=seed)


def write_folder(
    path: Path,
    model_type: str,
    *,
    seed: int = 0,
    changes: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> None:
    """Writes a folder in Hugging Face's format."""
    rules = huggingface_rules(config(model_type, **changes))
    weights = params(model_type, seed=seed, **changes)
    settings = entries(model_type, **changes)
    huggingface.save(path, weights, names=rules, config=settings, **options)


def write_gguf(
    path: Path,
    model_type: str,
    metadata: dict[str, Any] | None = None,
    quantized: Any | None = None,
) -> None:
    """Writes a GGUF file as llama.cpp's converter does, Llama's heads interleaved.

    Matrices are in float32 or in a type of quantised tensors.
    """
    import gguf

    settings = config(model_type)
    writer = gguf.GGUFWriter(path, model_type)
    writer.add_block_count(LAYERS)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(SHARED)
    writer.add_key_length(settings.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(settings.rope_theta)
    writer.add_vocab_size(VOCABULARY)
    for name, value in (metadata or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add.get(type(value), writer.add_array)(name, value)
    for name, tensor in gguf_tensors(model_type).items():
        if quantized is not None and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quantize(tensor, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model_type: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a GGUF file by name."""
    from lora_jax.exchange.peft._names import named_tree, taken

    tree = named_tree(params(model_type), gguf_rules(config(model_type)), None)
    tensors = {}
    for leaf in tree.leaves:
        for place in leaf.places:
            name = leaf.name(place)
            tensor = leaf.layout.file_weight(taken(leaf.leaf, leaf, place))
            if model_type == "llama" and ("attn_q." in name or "attn_k." in name):
                tensor = interleaved(tensor)
            tensors[name] = np.ascontiguousarray(tensor)
    if config(model_type).rope_scaling is not None:
        tensors["rope_freqs.weight"] = rope_divisors()
    return tensors


def interleaved(rows: np.ndarray) -> np.ndarray:
    """Returns the rows of queries or keys as llama.cpp's converter has them."""
    split = rows.reshape(-1, 2, DIM // 2, rows.shape[-1])
    return split.swapaxes(1, 2).reshape(rows.shape)


def rope_divisors() -> np.ndarray:
    """Returns what llama.cpp's converter writes for Llama 3's positions."""
    rates = 10_000.0 ** (-np.arange(DIM // 2) / (DIM // 2))
    wavelengths = 2 * np.pi / rates
    low = LLAMA3["original_max_position_embeddings"] / LLAMA3["low_freq_factor"]
    high = LLAMA3["original_max_position_embeddings"] / LLAMA3["high_freq_factor"]
    smooth = (low / wavelengths - 1) / (low / high - 1)
    between = 1 / ((1 - smooth) / LLAMA3["factor"] + smooth)
    divisors = np.where(
        wavelengths < high, 1, np.where(wavelengths > low, LLAMA3["factor"], between)
    )
    return divisors.astype(np.float32)


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length), np.int32)
