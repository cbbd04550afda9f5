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

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Tensors(Mapping[str, np.ndarray]):
    """The tensors by name, each read when it is asked for."""

    def __init__(self, source: Path, files: Mapping[str, Any]) -> None:
        self._source = source
        self._files = files

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a tensor, in memory of its own."""
        file = self._files[name]
        with as_checkpoint_error(f"`path` {self._source} has '{name}', which can't be read"):
            tensor: np.ndarray = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Yields the names in the order of the files."""
        return iter(self._files)

    def __len__(self) -> int:
        """Returns the number of tensors."""
        return len(self._files)


@contextlib.contextmanager
def opened(source: Path) -> Iterator[Tensors]:
    """Gives the tensors of a file or a folder.

    Raises:
      CheckpointError: there are none, a file is damaged, or the index names what is not there.
      ImportError: safetensors is not installed.
    """
    safetensors = safetensors_package("lora_jax.exchange.bitsandbytes")
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
        if (source / _INDEX).is_file():
            return _indexed(source)
        if (source / _ONE_FILE).is_file():
            return {source / _ONE_FILE: None}
        found = "holds neither" if source.is_dir() else "does not exist: expected"
        raise CheckpointError(
            f"`path` {source} {found} {_ONE_FILE} {'nor' if source.is_dir() else 'or'} {_INDEX}; "
            "model.save_pretrained(path) in transformers writes them."
        )


def _indexed(source: Path) -> dict[Path, list[str] | None]:
    file = source / _INDEX
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
