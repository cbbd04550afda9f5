"""The settings of published models, as their `config.json` on Hugging Face holds them.

Sources: `config.json` of meta-llama/Llama-3.1-8B, -70B and -405B, and of Qwen/Qwen3-8B and -32B.
Entries that decide neither a shape nor what the layers compute are left out.
"""

from collections.abc import Mapping
from typing import Any

from experiments.models.llama.config import config_of

_LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8_192,
    },
    "tie_word_embeddings": False,
}
_QWEN: Mapping[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
}


def _entries(
    common: Mapping[str, Any], *, layers: int, width: int, hidden: int, heads: int
) -> Mapping[str, Any]:
    return {
        **common,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
    }


_ENTRIES = {
    "llama-3.1-8b": _entries(_LLAMA, layers=32, width=4_096, hidden=14_336, heads=32),
    "llama-3.1-70b": _entries(_LLAMA, layers=80, width=8_192, hidden=28_672, heads=64),
    "llama-3.1-405b": _entries(_LLAMA, layers=126, width=16_384, hidden=53_248, heads=128),
    "qwen3-8b": _entries(_QWEN, layers=36, width=4_096, hidden=12_288, heads=32),
    "qwen3-32b": _entries(_QWEN, layers=64, width=5_120, hidden=25_600, heads=64),
}
MODELS = {name: config_of(entries, name) for name, entries in _ENTRIES.items()}

# How many devices share one example where the command does not say it.
TENSOR: Mapping[str, int] = {
    "llama-3.1-8b": 1,
    "llama-3.1-70b": 4,
    "llama-3.1-405b": 8,
    "qwen3-8b": 1,
    "qwen3-32b": 4,
}
