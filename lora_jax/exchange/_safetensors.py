"""The tensors of a checkpoint in safetensors: one file, or a folder with an index of several."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._folders import CheckpointError, as_checkpoint_error
from lora_jax._paths import listed
from lora_jax.exchange.peft._files import safetensors_package

# What transformers and diffusers call the files of a model.
STEMS = ("model", "diffusion_pytorch_model")


def one_file(stem: str) -> str:
    """Returns the name of a model's only file."""
    return f"{stem}.safetensors"


def index_of(stem: str) -> str:
    """Returns the name of the index of a model's several files."""
    return f"{stem}.safetensors.index.json"


class StoredTensor:
    """A tensor in a file, whose numbers are read each time when an array is made of it."""

    def __init__(self, source: Path, name: str, file: Any) -> None:
        self._source, self._name, self._file = source, name, file
        header = file.get_slice(name)
        self.shape = tuple(header.get_shape())
        self._dtype_name = header.get_dtype()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the array."""
        # Safetensors has dtypes, such as float4, that NumPy lacks.
        with as_checkpoint_error(f"{self._source} holds '{self._name}' in {self._dtype_name}"):
            return jnp.dtype(_DTYPES[self._dtype_name])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the numbers, in memory of their own."""
        with as_checkpoint_error(f"`path` {self._source} has '{self._name}', which can't be read"):
            tensor: np.ndarray = self._file.get_tensor(self._name)
        return tensor if dtype is None else tensor.astype(dtype, copy=False)


_DTYPES = {
    "BOOL": "bool",
    **{
        f"{kind}{bits}": f"{long}{bits}"
        for kind, long in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class Tensors(Mapping[str, StoredTensor]):
    """The tensors by name, each read when an array is made of it."""

    def __init__(self, source: Path, files: Mapping[str, Any]) -> None:
        self._source = source
        self._files = files

    def __getitem__(self, name: str) -> StoredTensor:
        """Returns a tensor, of which only shape and dtype are read."""
        return StoredTensor(self._source, name, self._files[name])

    def __iter__(self) -> Iterator[str]:
        """Yields the names in the order of the files."""
        return iter(self._files)

    def __len__(self) -> int:
        """Returns the number of tensors."""
        return len(self._files)


@contextlib.contextmanager
def opened(source: Path, *, reader: str) -> Iterator[Tensors]:
    """Gives the tensors of a file or a folder.

    Args:
      source: the file or the folder.
      reader: the module that reads, for the error.

    Raises:
      CheckpointError: there are none, a file is damaged, or the index names what is not there.
      ImportError: safetensors is not installed.
    """
    safetensors = safetensors_package(reader)
    with contextlib.ExitStack() as stack:
        of_name: dict[str, Any] = {}
        for file, names in _files(source).items():
            with as_checkpoint_error(f"{file} is damaged, take another copy"):
                if not file.is_file():
                    raise CheckpointError(f"{file} is missing, of which the index of {source} says")
                handle = stack.enter_context(safetensors.safe_open(file, framework="np"))
                held = list(handle.keys())
            missing = sorted(set(names or held) - set(held))
            if missing:
                raise CheckpointError(f"{file} does not hold {listed(missing)}; its index does.")
            of_name |= dict.fromkeys(names or held, handle)
        yield Tensors(source, of_name)


def checked_dtype(source: Path, name: str, tensor: np.ndarray) -> np.ndarray:
    """Returns a tensor that JAX takes as it is.

    Raises:
      CheckpointError: JAX would round it.
    """
    if jnp.asarray(np.zeros((), tensor.dtype)).dtype != tensor.dtype:
        raise CheckpointError(
            f"{source} holds '{name}' in {tensor.dtype}, which JAX would cut down; leave it out "
            'with load(path, names=...), or call jax.config.update("jax_enable_x64", True) before.'
        )
    return tensor


def _files(source: Path) -> dict[Path, list[str] | None]:
    """Returns the files, and which tensors of each belong to the checkpoint: None for all."""
    with as_checkpoint_error(f"`path` {source} can't be read"):
        if source.is_file():
            return {source: None}
        for stem in STEMS:
            if (source / index_of(stem)).is_file():
                return _indexed(source, source / index_of(stem))
            if (source / one_file(stem)).is_file():
                return {source / one_file(stem): None}
        found = "holds none of" if source.is_dir() else "does not exist: expected one of"
        names = listed([name(stem) for stem in STEMS for name in (one_file, index_of)])
        raise CheckpointError(
            f"`path` {source} {found} {names}; model.save_pretrained(path) in transformers or "
            "diffusers writes them."
        )


def _indexed(source: Path, file: Path) -> dict[Path, list[str] | None]:
    with as_checkpoint_error(f"{file} is damaged, take another copy"):
        placed = dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
        files: dict[Path, list[str] | None] = {}
        for name, own in placed.items():
            if Path(own).name != own:
                raise CheckpointError(f"{file} names the file {own!r}; expected one beside it.")
            names = files.setdefault(source / own, [])
            assert names is not None
            names.append(name)
    return files
