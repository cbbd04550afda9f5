"""Reading the adapters that kohya's scripts, or `save`, wrote."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from lora_jax._paths import listed
from lora_jax.exchange._module_adapters import AdapterFile, Place, adapter_file, read_tensors
from lora_jax.exchange.peft._load import Preview
from lora_jax.exchange.peft._names import GivenAxes, named_tree
from lora_jax.exchange.peft._rules import Rule

_MODULE = "lora_jax.exchange.kohya"
# With which the keys of each model of a pipeline begin.
COMPONENTS = ("lora_unet", "lora_te", "lora_te1", "lora_te2")
PARTS = {
    "lora_down.weight": "lora_A",
    "lora_up.weight": "lora_B",
    "dora_scale": "magnitude",
    "alpha": "alpha",
}


def load(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    names: Sequence[Rule],
    component: str = "lora_unet",
    axes: GivenAxes = None,
    freeze: str | Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> PyTree:
    r"""Returns `params` wrapped with an adapter in the file format of kohya's scripts.

    The name of a module has lines where PyTorch has dots: `lora_unet_mid_block_resnets_0_conv1`.
    The scale of each module is $\alpha / r$ with its `alpha`, and 1 where the file has none.
    `dora_scale` is the magnitude of each output (DoRA).

    Args:
      path: the file of safetensors.
      params: plain params of the model that the adapter belongs to.
      names: the rules for the model's parameters; the first whose path a leaf has counts.
      component: what the keys of the model begin with.
      axes: where the rules don't say it, each axis's role, as in `wrap`.
      freeze: which of `"lora_A"`, `"lora_B"` and `"magnitude"` do not train any further.
      ignore: the beginnings of keys of other components, such as `"lora_te"`, which are left out;
        unless they are named, they are refused.

    Returns:
      A wrapped tree, on JAX's default device.

    Raises:
      CheckpointError: the file can't be read or is damaged, holds adapters of another kind (such as
        LoHa or LoKr), or a tensor has no place or another shape; `preview` shows everything that
        does not fit.
      ValueError: `names` contradict each other or the tree, or give two modules one name here.
      ImportError: safetensors is not installed.

    Source: kohya-ss, sd-scripts, `networks/lora.py`.

    Examples:
      >>> import jax.numpy as jnp, lora_jax, pathlib, tempfile
      >>> from lora_jax.exchange import kohya, peft
      >>> params = {"attn1": {"to_q": {"kernel": jnp.ones((4, 3))}}}
      >>> wrapped = lora_jax.wrap(params, "to_q", rank=2, alpha=1)
      >>> names = [peft.Rule("attn1.to_q.weight", "attn1/to_q/kernel")]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "adapter.safetensors")
      ...     kohya.save(path, wrapped, names=names)
      ...     loaded = kohya.load(path, params, names=names)
      >>> loaded["attn1"]["to_q"]["kernel"].rank, float(loaded["attn1"]["to_q"]["kernel"].scale)
      (2, 0.5)
    """
    modules = modules_by_name(params, names)
    return _read(Path(path), component, modules).loaded(params, names, axes, freeze, ignore)


def preview(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    names: Sequence[Rule],
    component: str = "lora_unet",
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
      >>> from lora_jax.exchange import kohya, peft
      >>> params = {"to_q": {"kernel": jnp.ones((4, 3))}}
      >>> names = [peft.Rule("to_q.weight", "to_q/kernel")]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "adapter.safetensors")
      ...     kohya.save(path, lora_jax.wrap(params, "to_q", rank=2), names=names)
      ...     kohya.preview(path, params, names=names).problems
      ()
    """
    modules = modules_by_name(params, names)
    return _read(Path(path), component, modules).previewed(params, names, axes)


def other_tensors(
    path: str | os.PathLike[str], *, component: str = "lora_unet"
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
      >>> from lora_jax.exchange import kohya
      >>> tensors = {"lora_te_layer.lora_down.weight": np.ones((2, 4), np.float32)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "adapter.safetensors")
      ...     safetensors.numpy.save_file(tensors, path)
      ...     list(kohya.other_tensors(path))
      ['lora_te_layer.lora_down.weight']
    """
    return dict(_read(Path(path), component, {}).others)


def modules_by_name(tree: PyTree, names: Sequence[Rule]) -> dict[str, str]:
    """Returns the modules of a tree by their names with lines in place of dots.

    Raises:
      ValueError: two modules have one name then.
    """
    modules: dict[str, str] = {}
    for name in named_tree(tree, names, None).by_name:
        module = name.rpartition(".")[0]
        first = modules.setdefault(in_lines(module), module)
        if first != module:
            raise ValueError(
                f"`names` has the modules {listed([first, module])}, which both are called "
                f"{in_lines(module)!r} in a file of kohya's scripts."
            )
    return modules


def in_lines(module: str) -> str:
    """Returns a module's name with lines in place of dots."""
    return module.replace(".", "_")


def component_of(key: str) -> str | None:
    """Returns the component that a key begins with, if it does."""
    found = [name for name in COMPONENTS if key.startswith(f"{name}_")]
    return max(found, key=len, default=None)


def _read(path: Path, component: str, modules: Mapping[str, str]) -> AdapterFile:
    tensors, _ = read_tensors(path, _MODULE)
    keys = [key for key in sorted(tensors) if component_of(key) in (component, None)]
    return adapter_file(path, tensors, {key: _place_of(key, component, modules) for key in keys})


def _place_of(key: str, component: str, modules: Mapping[str, str]) -> Place | None:
    """Returns the place of a tensor, or None where it is no part of an adapter.

    A module that the tree does not have keeps its name, by which the plan refuses it.
    """
    name, _, part = key.partition(".")
    if component_of(key) is None or part not in PARTS:
        return None
    own = name.removeprefix(f"{component}_")
    return modules.get(own, own), PARTS[part]
