"""Which tensors of an adapter belong to which leaf, and what does not fit."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lora_jax._paths import listed, nearest_paths
from lora_jax._weight import is_adapter_node
from lora_jax.exchange.peft._config import is_target_parameter
from lora_jax.exchange.peft._held import PlannedLeaf, leaf_problems
from lora_jax.exchange.peft._keys import Key, parsed
from lora_jax.exchange.peft._places import NamedLeaf, NamedTree, Place, taken
from lora_jax.exchange.peft._tensors import Tensors

# Looking for the nearest names takes long where there are many.
_HINTS_AT_MOST = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a file holds, leaf by leaf, and what does not fit; no problems, then `load` succeeds."""

    leaves: dict[str, PlannedLeaf]
    problems: tuple[str, ...]


def planned(config: Mapping[str, Any], tensors: Tensors, tree: NamedTree) -> Plan:
    """Returns where the tensors of a file belong."""
    sorted_keys = [(key, parsed(key)) for key in sorted(tensors)]
    leaves: dict[str, PlannedLeaf] = {}
    problems = [
        f"'{key}' is nothing that lora_jax carries."
        for key, it in sorted_keys
        if it.part == "unknown"
    ]
    bases: list[tuple[str, NamedLeaf, Place]] = []
    for key, it in sorted_keys:
        if it.part in {"unknown", "unused"}:
            continue
        name = _parameter_name(config, tree, it)
        if name not in tree.by_name:
            nearest = nearest_paths(name, tree.by_name) if len(problems) < _HINTS_AT_MOST else []
            problems.append(_without_place(tree, key, name, tensors[key], nearest))
            continue
        named, place = tree.by_name[name]
        leaf = leaves.setdefault(named.path, PlannedLeaf(named))
        if it.part == "base":
            bases.append((key, named, place))
            continue
        if name == named.tied_name:
            leaf.other[it.part] = key
        elif it.part == "weight":
            problems += _weight_problems(tensors, leaf, place, key, name)
            leaf.weights.setdefault(place, key)
        else:
            leaf.adapted.setdefault(place, {})[it.part] = key
        problems += _kind_problems(key, it, named, is_other=name == named.tied_name)
    problems += _order_problems(config, tree)
    for key, named, place in bases:
        problems += _base_problems(key, tensors[key], named, place)
    occupied = {path: leaf for path, leaf in leaves.items() if any(leaf.keys)}
    for leaf in occupied.values():
        problems += leaf_problems(config, tensors, leaf)
    return Plan(occupied, tuple(problems))


def adapted_parameters(config: Mapping[str, Any], tree: NamedTree, module: str) -> list[str]:
    """Returns the parameters of a module that PEFT adapts as such, the innermost adapter first.

    PEFT wraps a module once for each of its adapted parameters, in the order in which the module
    defines them, and no file says which that is. The rules do: they stand in that order.
    """
    if not config.get("target_parameters"):
        return []
    return [
        name
        for name, (named, _) in tree.by_name.items()
        if named.rule.kind == "parameter"
        and name.rpartition(".")[0] == module
        and is_target_parameter(config, name)
    ]


def _parameter_name(config: Mapping[str, Any], tree: NamedTree, key: Key) -> str:
    if key.part in {"weight", "base"}:
        return key.name
    parameters = adapted_parameters(config, tree, key.name)
    if key.depth < len(parameters):
        return parameters[-1 - key.depth]
    return f"{key.name}.weight"


def _without_place(
    tree: NamedTree, key: str, name: str, tensor: np.ndarray, nearest: list[str]
) -> str:
    hint = f"; the nearest names are {listed(nearest)}" if nearest else ""
    unnamed = [named.path for named in tree.leaves if named.rule.tied is True]
    tied = f" If it is {listed(unnamed)} too, the rule says so: tied={name!r}." if unnamed else ""
    return (
        f"'{key}' of shape {tensor.shape} has no place: no rule in `names` gives a leaf of "
        f"`params` the PyTorch name '{name}'{hint}.{tied}"
    )


def _weight_problems(
    tensors: Tensors, leaf: PlannedLeaf, place: Place, key: str, name: str
) -> Iterator[str]:
    if place in leaf.weights and not np.array_equal(tensors[leaf.weights[place]], tensors[key]):
        yield f"'{leaf.weights[place]}' and '{key}' are two values of '{name}'."


def _kind_problems(key: str, it: Key, named: NamedLeaf, *, is_other: bool) -> Iterator[str]:
    # Of two parameters that share a weight, one is an embedding.
    is_embedding = (named.rule.kind == "embedding") != is_other
    if it.part in {"lora_A", "lora_B"} and it.is_embedding != is_embedding:
        kind = "embedding" if it.is_embedding else "linear"
        yield (
            f"'{key}' adapts an {'Embedding' if it.is_embedding else 'Linear or the like'}, and "
            f"'{named.path}' has the kind {named.rule.kind!r}; expected "
            f"Rule({named.rule.name!r}, {named.rule.path!r}, kind={kind!r})."
        )


def _order_problems(config: Mapping[str, Any], tree: NamedTree) -> Iterator[str]:
    """Says where one rule names two adapted parameters of a module, whose order is then unknown."""
    targets = [name for name in tree.by_name if is_target_parameter(config, name)]
    for module in {name.rpartition(".")[0]: None for name in targets}:
        rules = [tree.by_name[name][0].rule for name in adapted_parameters(config, tree, module)]
        if len(set(rules)) < len(rules):
            yield (
                f"the parameters of '{module}' share the rule {rules[0].name!r}; expected a rule "
                "for each, in the order in which the PyTorch module defines them."
            )


def _base_problems(key: str, tensor: np.ndarray, named: NamedLeaf, place: Place) -> Iterator[str]:
    """Says where a file brings a base weight of its own, as PEFT's does for embeddings."""
    if named.problem():
        return
    base = named.leaf.base if is_adapter_node(named.leaf) else named.leaf
    expected = named.layout.file_weight(taken(base, named, place))
    if not np.array_equal(tensor.astype(expected.dtype), expected):
        yield (
            f"'{key}' of shape {tensor.shape} is a base weight that differs from '{named.path}' in "
            f"`params`, of shape {expected.shape} in PyTorch. Was the vocabulary resized? Put that "
            "weight into `params` first."
        )
