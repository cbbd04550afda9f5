"""What is particular to a folder of these models in Hugging Face's format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.models.entries import CONFIG
from experiments.models.llama.config import LlamaConfig, config_of


def config_of_folder(folder: Path, entries: Mapping[str, Any]) -> LlamaConfig:
    """Returns the settings of the folder with these entries in its `config.json`.

    Raises:
      InputError: an entry is missing, or asks for what this model does not compute; it is named.
    """
    return config_of(entries, str(folder / CONFIG))


def weights(tensors: Mapping[str, Any], config: LlamaConfig) -> Mapping[str, Any]:
    """Returns the tensors without the angles that old versions of transformers saved."""
    return {name: each for name, each in tensors.items() if not name.endswith(".inv_freq")}
