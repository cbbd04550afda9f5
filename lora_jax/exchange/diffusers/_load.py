"""Reading the adapters that diffusers, or `save`, wrote."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from lora_jax._folders import as_checkpoint_error
from lora_jax.exchange._module_adapters import AdapterFile, adapter_file, read_tensors
from lora_jax.exchange.diffusers._keys import METADATA, component_of, place_of
from lora_jax.exchange.peft._files import check_supported, check_types, scale_of
from lora_jax.exchange.peft._load import Preview
from lora_jax.exchange.peft._names import GivenAxes
from lora_jax.exchange.peft._rules import Rule

_MODULE = "lora_jax.exchange.diffusers"


def load(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    names: Sequence[Rule],
    component: str = "unet",
    axes: GivenAxes = None,
    freeze: str | Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> PyTree:
    r"""Returns `params` wrapped with an adapter in the file format of diffusers.

    The names of its tensors may be those of today (`lora_A.weight`), those of before
    (`lora.down.weight`) or those of attention processors (`processor.to_q_lora.down.weight`). The
    scale of each module is $\alpha / r$ with the alpha of the metadata or of the file, and 1 where
    neither says it.

    Args:
      path: the file, such as `pytorch_lora_weights.safetensors`.
      params: plain params of the model that the adapter belongs to.
      names: the rules for the model's parameters; the first whose path a leaf has counts.
      component: the model's name in the pipeline, with which keys begin; keys that begin with no
        such name are its own.
      axes: where the rules don't say it, each axis's role, as in `wrap`.
      freeze: which of `"lora_A"`, `"lora_B"` and `"magnitude"` do not train any further.
      ignore: the beginnings of keys of other components, such as `"text_encoder"`, which are left
        out; unless they are named, they are refused.

    Returns:
      A wrapped tree, on JAX's default device.

    Raises:
      CheckpointError: the file can't be read or is damaged, or a tensor has no place or another
        shape; `preview` shows everything that does not fit.
      ValueError: `names` contradict each other or the tree.
      ImportError: safetensors is not installed.

    Source: Hugging Face diffusers, `loaders/lora_pipeline.py`.

    Examples:
      >>> import jax.numpy as jnp, lora_jax, pathlib, tempfile
      >>> from lora_jax.exchange import diffusers, peft
      >>> params = {"attn1": {"to_q": {"kernel": jnp.ones((4, 3))}}}
      >>> wrapped = lora_jax.wrap(params, "to_q", rank=2, alpha=1)
      >>> names = [peft.Rule("attn1.to_q.weight", "attn1/to_q/kernel")]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "pytorch_lora_weights.safetensors")
      ...     diffusers.save(path, wrapped, names=names)
      ...     loaded = diffusers.load(path, params, names=names)
      >>> loaded["attn1"]["to_q"]["kernel"].rank, float(loaded["attn1"]["to_q"]["kernel"].scale)
      (2, 0.5)
    """
    return _read(Path(path), component).loaded(params, names, axes, freeze, ignore)


def preview(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    names: Sequence[Rule],
    component: str = "unet",
    axes: GivenAxes = None,
) -> Preview:
    """Returns which tensor of a file belongs to which leaf, and what does not fit.

    Args:
      path: as for `load`, and so the others.
      params: see there.
      names: see there.
      component: see there.
      axes: see there.

    Returns:
      What `print` shows as a table; its `problems` are what keeps `load` from reading the file.

    Raises:
      CheckpointError: the file can't be read or is damaged.

    Examples:
      >>> import jax.numpy as jnp, lora_jax, pathlib, tempfile
      >>> from lora_jax.exchange import diffusers, peft
      >>> params = {"to_q": {"kernel": jnp.ones((4, 3))}}
      >>> names = [peft.Rule("to_q.weight", "to_q/kernel")]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "adapter.safetensors")
      ...     diffusers.save(path, lora_jax.wrap(params, "to_q", rank=2), names=names)
      ...     diffusers.preview(path, params, names=names).problems
      ()
    """
    return _read(Path(path), component).previewed(params, names, axes)


def other_tensors(
    path: str | os.PathLike[str], *, component: str = "unet"
) -> dict[str, np.ndarray]:
    """Returns the tensors of a file that belong to other components, such as text encoders.

    Args:
      path: the file.
      component: the component whose tensors are left out.

    Returns:
      The tensors by key, as they are in the file; `save(..., others=...)` writes them again.

    Raises:
      CheckpointError: the file can't be read or is damaged.

    Examples:
      >>> import numpy as np, pathlib, safetensors.numpy, tempfile
      >>> from lora_jax.exchange import diffusers
      >>> tensors = {"text_encoder.layer.lora_A.weight": np.ones((2, 4), np.float32)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "adapter.safetensors")
      ...     safetensors.numpy.save_file(tensors, path)
      ...     list(diffusers.other_tensors(path))
      ['text_encoder.layer.lora_A.weight']
    """
    return dict(_read(Path(path), component).others)


def _read(path: Path, component: str) -> AdapterFile:
    tensors, metadata = read_tensors(path, _MODULE)
    keys = [key for key in sorted(tensors) if component_of(key) in (component, None)]
    config = _config_in(path, metadata, component)

    def alpha(module: str, rank: int) -> float | None:
        return None if config is None else scale_of(config, module, rank) * rank

    return adapter_file(path, tensors, {key: place_of(key) for key in keys}, alpha)


def _config_in(path: Path, metadata: Mapping[str, str], component: str) -> dict[str, Any] | None:
    """Returns the config of a component in the metadata, if it is there."""
    if METADATA not in metadata:
        return None
    with as_checkpoint_error(f"{path} has metadata that is damaged"):
        entries = dict(json.loads(metadata[METADATA]))
        prefix = f"{component}."
        own = {
            key.removeprefix(prefix): value
            for key, value in entries.items()
            if key.startswith(prefix) or component_of(key) is None
        }
        if "lora_alpha" not in own:
            return None
        config = {**own, "peft_type": "LORA"}
        check_supported(config, str(path))
        check_types(config, str(path))
    return config
