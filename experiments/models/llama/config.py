"""The settings of a decoder-only language model, as `config.json` or a GGUF file holds them."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from experiments.common.errors import InputError
from experiments.models.entries import (
    check_positive,
    check_supported,
    check_unquantized,
    entry,
    without_none,
)

# The architectures, and what of theirs is not the same in all: {name: (biases on query, key and
# value; norms on query and key)}.
ARCHITECTURES: Mapping[str, tuple[bool, bool]] = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}

# Entries that ask for what this model does not compute, with the only value that it supports.
_SUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "pretraining_tp": 1,
}


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3 stretches rotary position embeddings to longer texts; names are Hugging Face's.

    Source: Grattafiori et al., The Llama 3 Herd of Models, 2024, section 3.4.2; `rope_type` llama3
    of transformers.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """The settings of one model; names and defaults are Hugging Face's.

    Attributes:
      model_type: the architecture, one of `ARCHITECTURES`.
      head_dim: the size of a head; hidden_size / num_attention_heads unless the file says it.
      rope_scaling: how positions are stretched, if they are.
      rope_divisors: the same as GGUF files have it: what the rate of each pair is divided by.
      sliding_window: how many tokens a token sees, itself included; None for all before it.
      tie_word_embeddings: whether the output layer is the embedding.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    rope_divisors: tuple[float, ...] | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False

    @property
    def gguf_architecture(self) -> str:
        """What GGUF files call the architecture: Mistral's tensors are Llama's."""
        return "llama" if self.model_type == "mistral" else self.model_type

    def with_rope_divisors(self, divisors: Iterable[float]) -> "LlamaConfig":
        """Returns the settings with positions that are stretched by numbers in a file."""
        return replace(self, rope_divisors=tuple(divisors))

    @property
    def has_biases(self) -> bool:
        """Whether query, key and value have biases."""
        return ARCHITECTURES[self.model_type][0]

    @property
    def has_head_norms(self) -> bool:
        """Whether each head of query and key is normalised."""
        return ARCHITECTURES[self.model_type][1]


def entries_of(config: LlamaConfig) -> dict[str, Any]:
    """Returns what a `config.json` holds, from which `config_of` makes the settings.

    Raises:
      InputError: positions are stretched by numbers of a GGUF file, for which there is no entry.
    """
    if config.rope_divisors is not None:
        raise InputError(
            "the model's positions are stretched by numbers in its GGUF file, which a config.json "
            "can't hold; pass the model's folder in Hugging Face's format"
        )
    names = {field.name for field in fields(config)} - {"rope_scaling", "rope_divisors"}
    entries = {name: getattr(config, name) for name in sorted(names)}
    entries |= {
        "architectures": [_CLASSES[config.model_type]],
        "hidden_act": "silu",
        "rope_scaling": None,
    }
    if config.rope_scaling is not None:
        entries["rope_scaling"] = {"rope_type": "llama3", **asdict(config.rope_scaling)}
    return entries


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def config_of(entries: Mapping[str, Any], source: str) -> LlamaConfig:
    """Returns the settings in the entries of a `config.json`; `source` is for errors."""
    model_type = entries.get("model_type")
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"{source}: model_type is {model_type!r}, expected one of {', '.join(ARCHITECTURES)}"
        )
    check_unquantized(entries, source)
    has_biases, _ = ARCHITECTURES[model_type]
    check_supported(entries, {**_SUPPORTED, "attention_bias": has_biases}, source)
    rope_theta, rope_scaling = _rope(entries, source)
    given = {
        **without_none(entries),
        "rope_theta": rope_theta,
        "sliding_window": entries.get("sliding_window") if model_type == "mistral" else None,
        "num_key_value_heads": entries.get("num_key_value_heads")
        or entry(entries, "num_attention_heads", int, source),
        "head_dim": entries.get("head_dim") or _head_dim(entries, source),
    }
    numbers = {
        field.name: entry(given, field.name, field.type, source)
        for field in fields(LlamaConfig)
        if field.name in given or field.name in _REQUIRED
        if not field.name.startswith("rope_") or field.name == "rope_theta"
    }
    config = LlamaConfig(**numbers, rope_scaling=rope_scaling)
    _check_consistent(config, source)
    return config


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def _head_dim(entries: Mapping[str, Any], source: str) -> int:
    width, heads = (
        entry(entries, name, int, source) for name in ("hidden_size", "num_attention_heads")
    )
    if width % heads:
        raise InputError(
            f"{source}: hidden_size {width} is not a multiple of num_attention_heads {heads}, and "
            "head_dim is missing"
        )
    return width // heads


def _rope(entries: Mapping[str, Any], source: str) -> tuple[float, Llama3Scaling | None]:
    """Returns the base of the rotary angles and their scaling, as any transformers wrote them."""
    own = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    theta = own.get("rope_theta", entries.get("rope_theta", LlamaConfig.rope_theta))
    kind = own.get("rope_type", own.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise InputError(
            f"{source}: rotary positions of type {kind!r}; expected 'default' or 'llama3'"
        )
    return float(theta), Llama3Scaling(
        **{
            field.name: entry(own, field.name, field.type, source)
            for field in fields(Llama3Scaling)
        }
    )


def _check_consistent(config: LlamaConfig, source: str) -> None:
    check_positive(config, source)
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"{source}: num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise InputError(f"{source}: head_dim is {config.head_dim}, expected an even number")
