"""The settings of a BERT encoder, as `config.json` holds them."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from experiments.common.errors import InputError
from experiments.models.entries import read_entries
from experiments.models.layers import ACTIVATIONS

# Entries besides the numbers, with the only value that this encoder supports.
_SUPPORTED = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


@dataclass(frozen=True)
class BertConfig:
    """The settings of one encoder; names and defaults are Hugging Face's."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    pad_token_id: int = 0

    @property
    def head_dropout(self) -> float:
        """The dropout rate of a pooled sentence, before the classifier."""
        chosen = self.classifier_dropout
        return self.hidden_dropout_prob if chosen is None else chosen


def read_config(path: Path) -> BertConfig:
    """Returns the settings in the file.

    Raises:
      InputError: an entry is missing, or does not describe a BERT encoder; it is named.
    """
    entries = read_entries(path)
    for name, supported in _SUPPORTED.items():
        _check_supported(path, entries, name, supported)
    config = BertConfig(
        **{
            field.name: _entry(path, entries, field.name)
            for field in fields(BertConfig)
            if field.name in entries or field.default is MISSING
        }
    )
    _check_consistent(path, config)
    return config


def _check_supported(path: Path, entries: Mapping[str, Any], name: str, supported: Any) -> None:
    found = entries.get(name, None if name == "model_type" else supported)
    if found != supported:
        raise InputError(
            f"{path}: {name} is {found!r}, expected {supported!r}; --model takes BERT encoders "
            "such as bert-base-uncased or all-MiniLM-L6-v2"
        )


def _entry(path: Path, entries: Mapping[str, Any], name: str) -> Any:
    """Returns the entry; raises unless it has the type of its field."""
    if name not in entries:
        raise InputError(f"{path}: {name} is missing; expected the config.json of a BERT encoder")
    value = entries[name]
    expected = BertConfig.__annotations__[name]
    # JSON has one type of number, so 0 may stand for 0.0; but true is not 1.
    allowed = expected | int if expected in (float, float | None) else expected
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise InputError(f"{path}: {name} is {value!r}, expected {_type_name(expected)}")
    return value


def _type_name(expected: Any) -> str:
    return {int: "a whole number", str: "a name"}.get(expected, "a number")


def _check_consistent(path: Path, config: BertConfig) -> None:
    counts = [field.name for field in fields(config) if field.type is int]
    for name in counts:
        least = 0 if name == "pad_token_id" else 1
        if getattr(config, name) < least:
            raise InputError(f"{path}: {name} is {getattr(config, name)}, expected {least} or more")
    if config.pad_token_id >= config.vocab_size:
        raise InputError(
            f"{path}: pad_token_id is {config.pad_token_id}, expected less than vocab_size "
            f"{config.vocab_size}"
        )
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{path}: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(
            f"{path}: hidden_act is {config.hidden_act!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
