"""Reading an adapter that PEFT, or `save`, wrote."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax._algebra import lora_weight
from lora_jax._dtypes import common_dtype
from lora_jax._folders import CheckpointError
from lora_jax._paths import map_with_paths
from lora_jax._settings import checked_freeze
from lora_jax._trees import check_plain
from lora_jax._weight import FullWeight, LoRAWeight
from lora_jax.exchange.peft._held import Keys, PlannedLeaf, adapter_layout, planned_scale
from lora_jax.exchange.peft._places import GivenAxes, NamedLeaf, named_tree
from lora_jax.exchange.peft._plan import planned
from lora_jax.exchange.peft._rules import Rule
from lora_jax.exchange.peft._tensors import Tensors, read_adapter


def load(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    names: Sequence[Rule],
    axes: GivenAxes = None,
    freeze: str | Sequence[str] = (),
    peft_version: str | None = None,
) -> PyTree:
    r"""Returns `params` wrapped with an adapter in the file format of Hugging Face PEFT.

    The model then computes with $W + \frac{\alpha}{r} B A$ (under rsLoRA $\frac{\alpha}{\sqrt r}$)
    as PEFT does, with the file's own numbers. Weights that were trained in full, by
    `modules_to_save` or `bias`, become `FullWeight` nodes. Only data is read: neither a pickle nor
    any class that a config names.

    Args:
      path: the folder with `adapter_config.json` and `adapter_model.safetensors`.
      params: plain params of the model that the adapter belongs to.
      names: the rules for the model's parameters; the first whose path a leaf has counts.
      axes: where the rules don't say it, each axis's role, as in `wrap`: a mapping from path or
        expression, or what `infer_axes` returned.
      freeze: leaves that are not to train on, of `"lora_A"`, `"lora_B"` and `"magnitude"`. The
        format does not say what was frozen.
      peft_version: the version of PEFT that wrote the file, in place of that in its config. It says
        how `target_parameters` with square matrices are laid out, and nothing else.

    Returns:
      A wrapped tree, on JAX's default device. A stack of which the file adapts some layers has
      these as its `layers`; one of which it trains some layers in full trains the others too.

    Raises:
      CheckpointError: there is no adapter, it is damaged or holds values that are not finite, it
        asks for what lora_jax does not carry, or a tensor has no place or another shape. `preview`
        shows all that does not fit.
      ValueError: `names` contradict each other or the tree.
      ImportError: safetensors is not installed.

    Source: Hugging Face PEFT, developer guide "PEFT checkpoint format".

    Examples:
      >>> import jax.numpy as jnp, lora_jax, tempfile
      >>> from lora_jax.exchange import peft
      >>> names = [peft.Rule("layer.{i}.query.weight", "layer_{i}/query/kernel")]
      >>> params = {"layer_0": {"query": {"kernel": jnp.ones((4, 3))}}}
      >>> wrapped = lora_jax.wrap(params, "query", rank=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     peft.save(folder, wrapped, names=names)
      ...     loaded = peft.load(folder, params, names=names)
      >>> bool((loaded["layer_0"]["query"]["kernel"].lora_A
      ...       == wrapped["layer_0"]["query"]["kernel"].lora_A).all())
      True
    """
    source = Path(path)
    frozen = checked_freeze("`freeze`", freeze)
    check_plain(params, "expected plain params: load(path, unwrap(params), ...).")
    config, tensors = read_adapter(source, peft_version)
    plan = planned(config, tensors, named_tree(params, names, axes))
    if plan.problems:
        raise CheckpointError(f"the adapter {source} does not fit: {summarised(plan.problems)}")
    if not plan.leaves:
        raise CheckpointError(f"the adapter {source} holds no tensors; expected some.")

    def node(path: str, leaf: Any) -> Any:
        if path not in plan.leaves:
            return leaf
        found = plan.leaves[path]
        if found.adapted:
            return _lora_weight(config, tensors, found, frozen)
        return _full_weight(tensors, found)

    return map_with_paths(node, params)


def summarised(problems: Sequence[str], limit: int = 5) -> str:
    """Returns problems as a text, cut at `limit`."""
    if len(problems) == 1:
        return problems[0]
    more = f"\n- and {len(problems) - limit} more" if len(problems) > limit else ""
    return "".join(f"\n- {problem}" for problem in problems[:limit]) + more


def _lora_weight(
    config: Mapping[str, Any], tensors: Tensors, found: PlannedLeaf, frozen: tuple[str, ...]
) -> LoRAWeight:
    named, places = found.named, sorted(found.adapted)
    parts = [_tree_parts(config, tensors, named, found.adapted[place]) for place in places]
    firsts = sorted({place[0] for place in places if place})
    count = named.leaf.shape[named.stack[0]] if named.stack else 0
    stack = [len(firsts), *(named.leaf.shape[axis] for axis in named.stack[1:])] if firsts else []
    arrays = {name: _stacked([part[name] for part in parts], stack) for name in parts[0]}
    first = places[0]
    scale = planned_scale(config, tensors, named, first, found.adapted[first])
    axes = named.axes
    assert axes is not None
    return lora_weight(
        named.leaf,
        **arrays,
        scale=jnp.asarray(scale, common_dtype(arrays["lora_A"].dtype, jnp.float32)),
        axes=axes,
        layers=None if len(firsts) == count else tuple(firsts),
        frozen=tuple(name for name in frozen if name in arrays),
    )


def _tree_parts(
    config: Mapping[str, Any], tensors: Tensors, named: NamedLeaf, keys: Keys
) -> dict[str, np.ndarray]:
    layout = adapter_layout(config, tensors, named, keys)
    assert layout is not None
    lora_A, lora_B = layout.tree_factors(tensors[keys["lora_A"]], tensors[keys["lora_B"]])
    parts = {"lora_A": lora_A, "lora_B": lora_B}
    if "magnitude" in keys:
        parts["magnitude"] = layout.tree_magnitude(tensors[keys["magnitude"]])
    return parts


def _stacked(parts: Sequence[np.ndarray], stack: Sequence[int]) -> Any:
    # A copy: the file may change while the tree is in use.
    return jnp.array(np.stack(parts).reshape((*stack, *parts[0].shape)))


def _full_weight(tensors: Tensors, found: PlannedLeaf) -> FullWeight:
    named = found.named
    value = np.array(named.leaf)
    in_order = np.moveaxis(value, named.stack, range(len(named.stack)))
    for place, key in found.weights.items():
        in_order[place] = named.layout.tree_weight(tensors[key]).astype(value.dtype)
    return FullWeight(base=named.leaf, value=jnp.array(value))
