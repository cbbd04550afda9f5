"""Writing an adapter that PEFT reads, with the config that belongs to it."""

import collections
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from lora_jax._folders import CheckpointError
from lora_jax.exchange.peft._export import (
    Adapter,
    Adapters,
    TrainedWeights,
    check_complete,
    exported_adapters,
    exported_weights,
)
from lora_jax.exchange.peft._files import (
    ROWS_KEY,
    changes_base,
    check_finite,
    check_supported,
    check_types,
    rank_divisor,
    safetensors_package,
    write_adapter,
)
from lora_jax.exchange.peft._layout import WRITTEN_AS, is_written_as_now
from lora_jax.exchange.peft._names import GivenAxes, NamedTree, named_tree
from lora_jax.exchange.peft._rules import Rule
from lora_jax.exchange.peft._tied import adapts_tied, untellable_tied
from lora_jax.exchange.peft._token_rows import TokenRows, exported_rows

_DEFAULTS = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "peft_type": "LORA",
    "revision": None,
    "task_type": None,
    "use_rslora": False,
}
# `target_modules` names every adapted module, so nothing else may choose among them.
_CHOICES = ("exclude_modules", "layers_pattern", "layers_to_transform")


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
    original base. Single rows are written as `trainable_token_indices`, each as the row that the
    model then has, in at least float32. The folder appears when it is complete; one that it
    replaces stays until then. All processes of a program call `save`, and the first one writes.

    Args:
      path: the folder to write; its parents are created.
      wrapped: what `wrap` or `load` returned, trained or not.
      names: the rules for the model's parameters; the first whose path a leaf has counts.
      axes: where the rules don't say it, the roles of the axes of weights trained in full.
      config: keys to write beside those that follow from `wrapped`, such as
        `base_model_name_or_path`, or what `read_config` returned. With `use_rslora`, the alphas
        are rsLoRA's.
      overwrite: whether to replace an adapter that is already at `path`.

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
    check_complete(wrapped, names)
    for named in tree.leaves:
        problem = untellable_tied(named)
        if problem is not None:
            raise CheckpointError(problem)
    adapters = exported_adapters(tree)
    rows = exported_rows(tree)
    weights = exported_weights(tree, adapters, rows, start)
    tensors = {**adapters.tensors, **rows.tensors, **weights.tensors}
    for key, tensor in tensors.items():
        check_finite("`wrapped`", key, tensor)
    content = written_config(start, adapters, rows, weights, tree)
    write_adapter(destination, tensors, content, overwrite=overwrite)


def starting_config(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns what is written whatever the tree holds: defaults and `given`, checked."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(
            f"`config` is {given!r}; expected a mapping, such as what read_config returned."
        )
    config = {**_DEFAULTS, **(given or {})}
    if changes_base(config["init_lora_weights"]):
        # The factors that are written belong to the original base.
        config["init_lora_weights"] = True
    check_supported(config, "`config`")
    check_types(config, "`config`")
    return config


def written_config(
    start: Mapping[str, Any],
    adapters: Adapters,
    rows: TokenRows,
    weights: TrainedWeights,
    tree: NamedTree,
) -> dict[str, Any]:
    """Returns the config with which PEFT computes what the tree computes."""
    parameters = [adapter.target for adapter in adapters.each if adapter.is_parameter]
    modules = [adapter.target for adapter in adapters.each if not adapter.is_parameter]
    if parameters and start["lora_dropout"]:
        raise CheckpointError(
            f"`config` has `lora_dropout` {start['lora_dropout']!r}, and '{parameters[0]}' has the "
            "kind 'parameter', for which PEFT has no dropout; save(..., config={**config, "
            "'lora_dropout': 0.0})."
        )
    ranks = {adapter.target: adapter.rank for adapter in adapters.each}
    alphas = {adapter.target: _alpha(adapter, start) for adapter in adapters.each}
    rank, rank_pattern = _common_and_pattern(ranks)
    alpha, alpha_pattern = _common_and_pattern(alphas)
    config = {
        **{key: value for key, value in start.items() if key not in _CHOICES},
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "target_modules": _target_modules(modules, tree),
        "bias": weights.bias,
        "fan_in_fan_out": any(_is_transposed(adapter) for adapter in adapters.each),
        "modules_to_save": list(weights.modules_to_save) or None,
        "use_dora": adapters.has_magnitudes,
    }
    config.pop("target_parameters", None)
    config.pop(ROWS_KEY, None)
    if rows.numbers:
        config[ROWS_KEY] = dict(rows.numbers)
    if adapts_tied(tree) or "ensure_weight_tying" in config:
        config["ensure_weight_tying"] = adapts_tied(tree)
    if not parameters:
        return config
    version = start.get("peft_version")
    return {
        **config,
        "target_parameters": parameters,
        "peft_version": version if is_written_as_now(version) else WRITTEN_AS,
    }


def _alpha(adapter: Adapter, config: Mapping[str, Any]) -> float:
    """Returns the shortest alpha for which PEFT computes exactly an adapter's scale."""
    scale, divisor = adapter.scale, rank_divisor(config, adapter.rank)
    exact = float(scale) * divisor
    if not math.isfinite(exact):
        raise CheckpointError(
            f"`wrapped` has the scale {float(scale)} at '{adapter.named.path}'; expected a finite "
            "number."
        )
    rounded = (float(f"{exact:.{digits}g}") for digits in range(1, 18))
    neighbours = (exact, np.nextafter(exact, -np.inf), np.nextafter(exact, np.inf))
    for alpha in (*rounded, *map(float, neighbours)):
        with np.errstate(over="ignore"):
            is_exact = scale.dtype.type(alpha / divisor) == scale
        if is_exact:
            return int(alpha) if alpha.is_integer() else alpha
    # In float64 not every number is a quotient by the rank; this is its neighbour.
    return exact


def _common_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the most frequent value, and the others by patterns that match one target each."""
    common = collections.Counter(values.values()).most_common(1)[0][0]
    return common, {
        f"^{re.escape(target)}": value for target, value in values.items() if value != common
    }


def _target_modules(modules: list[str], tree: NamedTree) -> list[str] | str:
    """Returns the modules as a list, or as an expression where PEFT would take one for another."""
    others = {name.rpartition(".")[0] for name in tree.by_name} - set(modules)
    is_ambiguous = any(other.endswith(f".{module}") for module in modules for other in others)
    return "|".join(map(re.escape, modules)) if is_ambiguous else modules


def _is_transposed(adapter: Adapter) -> bool:
    return adapter.named.rule.transposed and not adapter.is_parameter
