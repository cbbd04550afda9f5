"""Reading and writing the tensors of an adapter, without PyTorch and without pickle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._folders import CheckpointError, as_checkpoint_error, undisturbed
from lora_jax.exchange.peft._config import TENSORS_FILE, no_tensors, read_config

Tensors = dict[str, np.ndarray]


def read_adapter(source: Path, peft_version: str | None) -> tuple[dict[str, Any], Tensors]:
    """Returns the config and the tensors of the adapter in a folder, both of one version of it.

    A version of PEFT that is given takes the place of that in the config.
    """
    if not isinstance(peft_version, str | None):
        raise TypeError(f"`peft_version` is {peft_version!r}; expected text, such as '0.17.1'.")
    config, tensors = undisturbed(source, lambda: (read_config(source), read_tensors(source)))
    return (config if peft_version is None else {**config, "peft_version": peft_version}), tensors


def read_tensors(source: Path) -> Tensors:
    """Returns the tensors of the adapter in a folder, in the dtypes of the file."""
    safetensors = safetensors_package()
    file = source / TENSORS_FILE
    with as_checkpoint_error(f"`path` {source} can't be read"):
        if not file.is_file():
            raise CheckpointError(no_tensors(source))
    with (
        as_checkpoint_error(f"{file} is damaged, take another copy"),
        safetensors.safe_open(file, framework="np") as opened,
    ):
        tensors: Tensors = opened.get_tensors()
    for key, tensor in tensors.items():
        _check_readable(file, key, tensor)
    return tensors


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as PEFT's loader expects them."""
    from safetensors.numpy import save_file

    # What is not contiguous would be written in the order of its memory.
    contiguous = {key: np.asarray(tensor, order="C") for key, tensor in tensors.items()}
    save_file(contiguous, folder / TENSORS_FILE, metadata={"format": "pt"})


def check_finite(subject: str, key: str, tensor: np.ndarray) -> None:
    """Raises if a tensor holds values that are no numbers."""
    count = int(np.size(tensor) - np.sum(np.isfinite(tensor)))
    if count:
        raise CheckpointError(
            f"{subject} has {count} of {tensor.size} values in '{key}' that are not finite; "
            "expected finite numbers. The training that made them diverged."
        )


def _check_readable(file: Path, key: str, tensor: np.ndarray) -> None:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise CheckpointError(
            f"{file} holds '{key}' in {tensor.dtype}; expected a floating-point dtype."
        )
    if jnp.asarray(np.zeros((), tensor.dtype)).dtype != tensor.dtype:
        raise CheckpointError(
            f"{file} holds '{key}' in {tensor.dtype}, which JAX would cut; call "
            'jax.config.update("jax_enable_x64", True) before load.'
        )
    check_finite(str(file), key, tensor)


def safetensors_package() -> Any:
    """Returns the package, imported where it is used: importing lora_jax stays cheap."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "lora_jax.exchange.peft needs safetensors: pip install 'lora-jax[peft]'."
        ) from error
    return safetensors
