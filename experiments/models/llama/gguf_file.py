"""A model in a GGUF file: its settings, its weights as they are stored, and its texts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.errors import InputError, as_input_error, needed_module
from experiments.models.llama.config import ARCHITECTURES, LlamaConfig, config_of
from lora_jax.exchange import gguf as exchange

# GGUF has no name of its own for Mistral, whose tensors are Llama's.
_ARCHITECTURES = tuple(name for name in ARCHITECTURES if name != "mistral")
# Hugging Face's name of each setting.
_SETTINGS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_ROPE_FACTORS = "rope_freqs.weight"
_HEAD = "output.weight"


class GGUFFile:
    """One file; its metadata is read at once, its tensors when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Reads the metadata.

        Raises:
          InputError: it is no GGUF file of an architecture that this model computes.
        """
        gguf = needed_module("gguf", "lora-jax[llm]")
        if not path.is_file():
            raise InputError(f"{path} is not a file; expected a model in GGUF's format")
        try:
            reader = gguf.GGUFReader(path)
            self.metadata: Mapping[str, Any] = {
                name: field.contents() for name, field in reader.fields.items()
            }
        except Exception as error:  # the reader raises whatever the bytes lead to
            raise InputError(f"{path} is damaged or is not a GGUF file ({error})") from error
        self.path = path
        self._names = frozenset(tensor.name for tensor in reader.tensors)
        self.config = self._read_config()

    def tensors(self, *, quantized: bool) -> Mapping[str, Any]:
        """Returns the tensors by name, the rows of each head in the order of Hugging Face's model.

        Args:
          quantized: whether weights stay quantised as they are stored, or are dequantised when
            their numbers are read.
        """
        names = self._names - {_ROPE_FACTORS}
        with as_input_error():
            stored = exchange.load(self.path, names=sorted(names))
        in_order = {name: self._with_halves(name, tensor) for name, tensor in stored.items()}
        return in_order if quantized else Dequantized(in_order)

    def _read_config(self) -> LlamaConfig:
        kind = self.metadata.get("general.type", "model")
        architecture = self.metadata.get("general.architecture")
        if kind != "model" or architecture not in _ARCHITECTURES:
            raise InputError(
                f"{self.path} holds a {kind} of the architecture {architecture!r}, expected a "
                f"model of {', '.join(_ARCHITECTURES)}"
            )
        found = {
            name: self.metadata[f"{architecture}.{key}"]
            for name, key in _SETTINGS.items()
            if f"{architecture}.{key}" in self.metadata
        }
        scaling = self.metadata.get(f"{architecture}.rope.scaling.type", "none")
        if scaling not in ("none", "linear") or (
            scaling == "linear" and self.metadata.get(f"{architecture}.rope.scaling.factor", 1) != 1
        ):
            raise InputError(
                f"{self.path} stretches rotary positions by {scaling!r}, expected none"
            )
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        size = self.metadata.get(f"{architecture}.vocab_size", len(tokens or ()))
        entries = {
            "model_type": architecture,
            "vocab_size": size,
            "tie_word_embeddings": _HEAD not in self._names,
            **{name: _shortest(value) for name, value in found.items()},
        }
        config = config_of(entries, str(self.path))
        if _ROPE_FACTORS not in self._names:
            return config
        factors = exchange.load(self.path, names=[_ROPE_FACTORS])[_ROPE_FACTORS]
        return config.with_rope_divisors(map(float, np.asarray(factors)))

    def _with_halves(self, name: str, tensor: Any) -> Any:
        """Returns queries and keys of Llama as models have them that rotate halves of heads.

        The converter of llama.cpp interleaves the halves, in the architecture llama alone.
        """
        config = self.config
        module = name.removesuffix(".weight").rpartition(".")[2]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if config.model_type != "llama" or module not in heads:
            return tensor
        rows, width = tensor.shape
        split = tensor.reshape((heads[module], config.head_dim // 2, 2, width))
        return split.transpose((0, 2, 1, 3)).reshape((rows, width))


class Dequantized(Mapping[str, Any]):
    """Tensors of which those that are quantised are dequantised when their numbers are read."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        """Keeps the tensors."""
        self._tensors = tensors

    def __getitem__(self, name: str) -> Any:
        """Returns a tensor with a shape and a dtype, of which NumPy makes an array."""
        tensor = self._tensors[name]
        return _Dequantized(tensor) if hasattr(tensor, "dequantize") else tensor

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Returns the number of tensors."""
        return len(self._tensors)


class _Dequantized:
    def __init__(self, weight: Any) -> None:
        self._weight = weight
        self.shape, self.dtype = weight.shape, weight.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self._weight.dequantize(), dtype)


def _shortest(value: Any) -> Any:
    """Returns a number that the file has in float32 as it was written, such as 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
