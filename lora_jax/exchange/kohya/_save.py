"""Writing adapters that kohya's scripts, and the programs of their users, read."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from lora_jax.exchange._module_adapters import (
    adapters_to_write,
    alpha_of,
    checked_others,
    write_file,
)
from lora_jax.exchange.kohya._load import PARTS, component_of, in_lines, modules_by_name
from lora_jax.exchange.peft._export import Adapter
from lora_jax.exchange.peft._files import safetensors_package
from lora_jax.exchange.peft._rules import Rule

_MODULE = "lora_jax.exchange.kohya"
_KEYS = {part: key for key, part in PARTS.items()}


def save(
    path: str | os.PathLike[str],
    wrapped: PyTree,
    *,
    names: Sequence[Rule],
    component: str = "lora_unet",
    others: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapters of `wrapped` in the file format of kohya's scripts.

    Args:
      path: the file to write, which ends in `.safetensors`.
      wrapped: what `wrap` or `load` returned, trained or not.
      names: the rules for the model's parameters; the first whose path a leaf has counts.
      component: what the keys begin with.
      others: tensors of other components to write beside it, as `other_tensors` returns them.
      overwrite: whether to replace a file of safetensors.

    Raises:
      CheckpointError: `wrapped` has no adapters, trains weights in full, a node has no name, a
        value is not finite, or `path` is taken or can't be written.
      ValueError: `names` contradict each other or the tree, or give two modules one name here;
        `others` belongs to the component.
      ImportError: safetensors is not installed.

    Source: kohya-ss, sd-scripts, `networks/lora.py`.

    Examples:
      >>> import jax.numpy as jnp, lora_jax, pathlib, safetensors.numpy, tempfile
      >>> from lora_jax.exchange import kohya, peft
      >>> wrapped = lora_jax.wrap({"to_q": {"kernel": jnp.ones((4, 3))}}, "to_q", rank=2)
      >>> names = [peft.Rule("attn1.to_q.weight", "to_q/kernel")]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "adapter.safetensors")
      ...     kohya.save(path, wrapped, names=names)
      ...     for key in sorted(safetensors.numpy.load_file(path)):
      ...         print(key)
      lora_unet_attn1_to_q.alpha
      lora_unet_attn1_to_q.lora_down.weight
      lora_unet_attn1_to_q.lora_up.weight
    """
    safetensors_package(_MODULE)
    beside = checked_others(others, component, component_of)
    modules_by_name(wrapped, names)
    _, adapters = adapters_to_write(wrapped, names)
    named = {
        f"{component}_{in_lines(adapter.module)}.{key}": tensor
        for adapter in adapters.each
        for key, tensor in _tensors_of(adapter)
    }
    write_file(Path(path).resolve(), {**named, **beside}, {"format": "pt"}, overwrite=overwrite)


def _tensors_of(adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of one module; magnitudes have the axes of the weight."""
    for part, tensor in adapter.parts.items():
        if part == "magnitude":
            window = adapter.parts["lora_A"].ndim - 2
            yield _KEYS[part], tensor.reshape(-1, 1, *(1,) * window)
        else:
            yield _KEYS[part], tensor
    yield _KEYS["alpha"], np.asarray(alpha_of(adapter), adapter.parts["lora_A"].dtype)
