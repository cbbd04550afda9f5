"""Writing an adapter that PEFT reads."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from lora_jax._folders import CheckpointError, check_destination, complete_folder
from lora_jax._paths import listed
from lora_jax._trees import adapter_nodes, check_whole
from lora_jax._weight import is_lora_weight
from lora_jax.exchange.peft._config import CONFIG_FILE, TENSORS_FILE
from lora_jax.exchange.peft._export import exported_adapters
from lora_jax.exchange.peft._places import GivenAxes, named_tree
from lora_jax.exchange.peft._rules import Rule
from lora_jax.exchange.peft._tensors import check_finite, safetensors_package, write_tensors
from lora_jax.exchange.peft._tied import untellable_tied
from lora_jax.exchange.peft._trained import exported_weights
from lora_jax.exchange.peft._written_config import starting_config, written_config


def save(
    path: str | os.PathLike[str],
    wrapped: PyTree,
    *,
    names: Sequence[Rule],
    axes: GivenAxes = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    r"""Writes the adapters of `wrapped` in the file format of Hugging Face PEFT.

    $r$, `lora_alpha` and their patterns are chosen so that PEFT computes exactly the scale of each
    node. A node whose initialiser changed the base is written as one of twice the rank on the
    original base. The folder appears when it is complete; one that is overwritten stays until then.

    Args:
      path: the folder to write; what is above it is created.
      wrapped: what `wrap` or `load` returned, trained or not.
      names: the rules for the model's parameters; the first whose path a leaf has counts.
      axes: where the rules don't say it, the roles of the axes of weights trained in full.
      config: keys to write beside those that follow from `wrapped`, such as
        `base_model_name_or_path`, or what `read_config` returned. With `use_rslora`, the alphas
        are rsLoRA's.
      overwrite: whether an adapter that is at `path` already may be replaced.

    Raises:
      CheckpointError: `wrapped` has no adapters, a node has no name or can't be said in the format,
        a value is not finite, or `path` is taken or can't be written.
      ValueError: `names` contradict each other or the tree.
      ImportError: safetensors is not installed.

    Source: Hugging Face PEFT, developer guide "PEFT checkpoint format".

    Examples:
      >>> import jax.numpy as jnp, lora_jax, pathlib, tempfile
      >>> from lora_jax.exchange import peft
      >>> wrapped = lora_jax.wrap({"query": {"kernel": jnp.ones((4, 3))}}, "query", rank=2)
      >>> names = [peft.Rule("attention.query.weight", "query/kernel")]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     peft.save(folder, wrapped, names=names, config={"task_type": "CAUSAL_LM"})
      ...     sorted(file.name for file in pathlib.Path(folder).iterdir())
      ...     config = peft.read_config(folder)
      ['adapter_config.json', 'adapter_model.safetensors']
      >>> config["r"], config["lora_alpha"], config["target_modules"]
      (2, 2, ['attention.query'])
    """
    destination = Path(path).resolve()
    safetensors_package()
    start = starting_config(config)
    tree = named_tree(wrapped, names, axes)
    _check_complete(wrapped, names)
    for named in tree.leaves:
        problem = untellable_tied(named)
        if problem is not None:
            raise CheckpointError(problem)
    adapters = exported_adapters(tree)
    weights = exported_weights(tree, adapters, start)
    tensors = {**adapters.tensors, **weights.tensors}
    for key, tensor in tensors.items():
        check_finite("`wrapped`", key, tensor)
    content = written_config(start, adapters, weights, tree)
    check_destination(destination, obstacle=_obstacle, content="an adapter", overwrite=overwrite)
    with complete_folder(destination, overwrite=overwrite) as folder:
        write_tensors(folder, tensors)
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def _check_complete(wrapped: PyTree, names: Sequence[Rule]) -> None:
    """Raises unless `wrapped` has nodes, each whole and with a rule."""
    nodes = adapter_nodes(wrapped)
    for path, node in nodes.items():
        check_whole(path, node)
    stacked = [path for path, node in nodes.items() if is_lora_weight(node) and node.is_stacked]
    if stacked:
        raise CheckpointError(
            f"`wrapped` holds several adapters at {listed(stacked)}; expected one, as a file does: "
            "save(path, serving.select(bank, id), ...)."
        )
    nameless = [path for path in nodes if all(rule.fields_of(path) is None for rule in names)]
    if nameless:
        raise CheckpointError(
            f"`names` has no rule for {listed(nameless)}, which `wrapped` adapts or trains; "
            f"expected one, such as Rule('PYTORCH.NAME.weight', {nameless[0]!r})."
        )


def _obstacle(destination: Path) -> str | None:
    """Returns what keeps an adapter from replacing what is at `destination`, or None."""
    others = (
        sorted({file.name for file in destination.iterdir()} - {CONFIG_FILE, TENSORS_FILE})
        if destination.is_dir()
        else [destination.name]
    )
    return f"holds {listed(others)}, which is not part of an adapter" if others else None
