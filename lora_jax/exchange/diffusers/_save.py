"""Writing adapters that diffusers reads."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from lora_jax.exchange._module_adapters import adapters_to_write, checked_others, write_file
from lora_jax.exchange.diffusers._keys import METADATA, component_of
from lora_jax.exchange.peft._export import TrainedWeights
from lora_jax.exchange.peft._files import safetensors_package
from lora_jax.exchange.peft._names import PREFIX
from lora_jax.exchange.peft._rules import Rule
from lora_jax.exchange.peft._save import starting_config, written_config
from lora_jax.exchange.peft._token_rows import TokenRows

_MODULE = "lora_jax.exchange.diffusers"
# What the format has no place for.
_NO_ROWS = TokenRows({}, {}, {})
_NO_WEIGHTS = TrainedWeights({}, (), "none")


def save(
    path: str | os.PathLike[str],
    wrapped: PyTree,
    *,
    names: Sequence[Rule],
    component: str = "unet",
    others: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapters of `wrapped` in the file format of diffusers.

    The keys are those of today. Ranks and alphas are in the file's metadata, which diffusers reads
    from version 0.34 on; versions before it take each scale for 1.

    Args:
      path: the file to write, which ends in `.safetensors`; diffusers looks for
        `pytorch_lora_weights.safetensors` in a folder.
      wrapped: what `wrap` or `load` returned, trained or not.
      names: the rules for the model's parameters; the first whose path a leaf has counts.
      component: the model's name in the pipeline, with which keys begin.
      others: tensors of other components to write beside it, as `other_tensors` returns them.
      overwrite: whether to replace a file of safetensors.

    Raises:
      CheckpointError: `wrapped` has no adapters, trains weights in full, a node has no name, a
        value is not finite, or `path` is taken or can't be written.
      ValueError: `names` contradict each other or the tree, or `others` belongs to the component.
      ImportError: safetensors is not installed.

    Source: Hugging Face diffusers, `loaders/lora_base.py`.

    Examples:
      >>> import jax.numpy as jnp, lora_jax, pathlib, safetensors.numpy, tempfile
      >>> from lora_jax.exchange import diffusers, peft
      >>> wrapped = lora_jax.wrap({"to_q": {"kernel": jnp.ones((4, 3))}}, "to_q", rank=2)
      >>> names = [peft.Rule("attn1.to_q.weight", "to_q/kernel")]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "adapter.safetensors")
      ...     diffusers.save(path, wrapped, names=names)
      ...     sorted(safetensors.numpy.load_file(path))
      ['unet.attn1.to_q.lora_A.weight', 'unet.attn1.to_q.lora_B.weight']
    """
    safetensors_package(_MODULE)
    beside = checked_others(others, component, component_of)
    tree, adapters = adapters_to_write(wrapped, names)
    config = written_config(starting_config(None), adapters, _NO_ROWS, _NO_WEIGHTS, tree)
    named = {
        f"{component}.{key.removeprefix(PREFIX)}": tensor
        for key, tensor in adapters.tensors.items()
    }
    entries: dict[str, Any] = {f"{component}.{key}": value for key, value in config.items()}
    metadata = {"format": "pt", METADATA: json.dumps(entries, indent=2, sort_keys=True)}
    write_file(Path(path).resolve(), {**named, **beside}, metadata, overwrite=overwrite)
