"""Which tensors of an adapter belong to which leaf, and what does not fit."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lora_jax._paths import listed, nearest_paths
from lora_jax._weight import is_adapter_node
from lora_jax.exchange.peft._files import ROWS_KEY, Tensors, is_target_parameter, rank_of, scale_of
from lora_jax.exchange.peft._layout import Layout, file_layout
from lora_jax.exchange.peft._names import Key, NamedLeaf, NamedTree, Place, parsed, taken
from lora_jax.exchange.peft._tied import tied_in_file
from lora_jax.exchange.peft._token_rows import is_lookup, row_problems, tied_row_problems

# Looking for the nearest names takes long where there are many.
_HINTS_AT_MOST = 5

_HINTS = {
    "conv": " PEFT's adapter of a convolution with groups reads the channels of all groups, which "
    "no change of the grouped kernel does; lora_jax does not support it.",
    "parameter": " The rules for a module's parameters must stand in the order in which PyTorch "
    "defines them.",
}

# The key of each part of an adapter.
Keys = dict[str, str]


@dataclasses.dataclass(frozen=True)
class PlannedLeaf:
    """A leaf with what a file holds of it.

    Attributes:
      named: the leaf with its rule.
      adapted: for each place of the stack that is adapted, the keys of the parts.
      weights: for each place whose weight was trained in full, its key.
      other: of a leaf that is two parameters, the keys of what the file holds of the other one.
    """

    named: NamedLeaf
    adapted: dict[Place, Keys] = dataclasses.field(default_factory=dict)
    weights: dict[Place, str] = dataclasses.field(default_factory=dict)
    other: Keys = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> Iterator[str]:
        """Every tensor of the file that belongs here."""
        parts = itertools.chain.from_iterable(keys.values() for keys in self.adapted.values())
        return itertools.chain(parts, self.weights.values(), self.other.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a file holds, leaf by leaf, and what does not fit; `load` needs no problems."""

    leaves: dict[str, PlannedLeaf]
    problems: tuple[str, ...]


def planned(config: Mapping[str, Any], tensors: Tensors, tree: NamedTree) -> Plan:
    """Returns where the tensors of a file belong."""
    sorted_keys = [(key, parsed(key)) for key in sorted(tensors)]
    leaves: dict[str, PlannedLeaf] = {}
    problems = [
        f"'{key}' is not a tensor that lora_jax supports."
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
        if _is_of_other(it, named, name):
            leaf.other[it.part] = key
        elif it.part == "weight":
            problems += _two_values(tensors, leaf, place, key, name)
            leaf.weights.setdefault(place, key)
        else:
            leaf.adapted.setdefault(place, {})[it.part] = key
        problems += _kind_problems(key, it, named, is_other=name == named.tied_name)
    problems += _order_problems(config, tree)
    problems += _missing_rows(config, [it for _, it in sorted_keys])
    for key, named, place in bases:
        problems += _base_problems(key, tensors[key], named, place)
    occupied = {path: leaf for path, leaf in leaves.items() if any(leaf.keys)}
    for leaf in occupied.values():
        problems += _leaf_problems(config, tensors, leaf)
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


def adapter_layout(
    config: Mapping[str, Any], tensors: Tensors, named: NamedLeaf, keys: Keys
) -> Layout | None:
    """Returns how the file lays out one adapter; None where that can't be told."""
    return file_layout(named.layout, tensors[keys["lora_A"]].shape, config.get("peft_version"))


def planned_scale(
    config: Mapping[str, Any], tensors: Tensors, named: NamedLeaf, place: Place, keys: Keys
) -> float:
    """Returns the scale of one adapter."""
    rank = named.layout.rank(tensors[keys["lora_A"]].shape)
    return scale_of(config, _config_name(named, place), rank)


def _parameter_name(config: Mapping[str, Any], tree: NamedTree, key: Key) -> str:
    if key.part in {"weight", "base"}:
        return key.name
    parameters = adapted_parameters(config, tree, key.name)
    if key.depth < len(parameters):
        return parameters[-1 - key.depth]
    return f"{key.name}.weight"


def _is_of_other(key: Key, named: NamedLeaf, name: str) -> bool:
    """Says whether a tensor is that of the other parameter, of a leaf that is two.

    Rows are those of the embedding, whatever name the leaf has first: the output layer follows.
    """
    return not is_lookup(named, name) if key.part == "rows" else name == named.tied_name


def _missing_rows(config: Mapping[str, Any], keys: Iterable[Key]) -> Iterator[str]:
    if config.get(ROWS_KEY) and all(key.part != "rows" for key in keys):
        yield f"the config has `{ROWS_KEY}` {config[ROWS_KEY]!r}, and no tensor has these rows."


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


def _two_values(
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


def _leaf_problems(config: Mapping[str, Any], tensors: Tensors, leaf: PlannedLeaf) -> Iterable[str]:
    """Returns why what a file holds of a leaf can't become a node there."""
    problem = leaf.named.problem()
    if problem is not None:
        return [problem]
    problems = [*_weight_problems(tensors, leaf), *_tied_problems(config, tensors, leaf)]
    if leaf.adapted and leaf.weights:
        problems.append(
            f"'{leaf.named.path}' is adapted and trained in full, by {listed(list(leaf.keys))}."
        )
    each = [
        problem
        for place, keys in leaf.adapted.items()
        for problem in _adapter_problems(config, tensors, leaf.named, place, keys)
    ]
    # What holds for the stack as a whole can be asked where each place is right.
    return [*problems, *(each or _stack_problems(config, tensors, leaf))]


def _weight_problems(tensors: Tensors, leaf: PlannedLeaf) -> Iterator[str]:
    expected = leaf.named.layout.weight_shape
    dtype = leaf.named.leaf.dtype
    for key in leaf.weights.values():
        tensor = tensors[key]
        if tensor.shape != expected:
            yield (
                f"'{key}' has shape {tensor.shape}; expected {expected} for '{leaf.named.path}' of "
                f"shape {tuple(leaf.named.leaf.shape)}, whose rule has the kind "
                f"{leaf.named.rule.kind!r} and the axes {leaf.named.axes}."
            )
        elif not _is_held_by(tensor, dtype):
            yield (
                f"'{key}' was trained in full as {tensor.dtype}, and `params` has {dtype} at "
                f"'{leaf.named.path}', which can't hold it; cast it with astype('{tensor.dtype}')."
            )


def _tied_problems(config: Mapping[str, Any], tensors: Tensors, leaf: PlannedLeaf) -> Iterator[str]:
    own = dict(leaf.adapted.get((), {}))
    if "rows" in {**own, **leaf.other}:
        return tied_row_problems(tensors, leaf.named, own, leaf.other)
    if () in leaf.weights:
        own["weight"] = leaf.weights[()]
    return tied_in_file(config, tensors, leaf.named, own, leaf.other)


def _is_held_by(tensor: np.ndarray, dtype: Any) -> bool:
    """Says whether a dtype has exactly the values of a tensor."""
    with np.errstate(over="ignore"):
        return np.array_equal(tensor.astype(dtype).astype(tensor.dtype), tensor)


def _adapter_problems(
    config: Mapping[str, Any], tensors: Tensors, named: NamedLeaf, place: Place, keys: Keys
) -> Iterator[str]:
    name, rule = named.name(place), named.rule
    if "rows" in keys:
        yield from row_problems(config, tensors, named, keys)
        return
    required = ["lora_A", "lora_B", *(["magnitude"] if config.get("use_dora") else [])]
    if set(keys) != set(required):
        yield (
            f"'{name}' has {listed(list(keys.values()))}; expected {listed(required)}, since the "
            f"config has `use_dora` {bool(config.get('use_dora'))}."
        )
        return
    if rule.kind == "array" or not {"in", "out"} <= set(named.axes or ()):
        yield (
            f"'{keys['lora_A']}' adapts '{named.path}' with the axes {named.axes} and the kind "
            f"{rule.kind!r}; expected an 'in' and an 'out' axis and a kind other than 'array': "
            f"Rule({rule.name!r}, {rule.path!r}, kind=..., axes=...)."
        )
        return
    layout = adapter_layout(config, tensors, named, keys)
    if layout is None:
        yield (
            f"'{keys['lora_A']}' adapts '{named.path}', whose matrices are square, and the config "
            f"has `peft_version` {config.get('peft_version')!r}: up to 0.18, and after it, PEFT "
            "has the factors of experts the other way round. load(..., peft_version='0.17.0') or "
            "whichever wrote it says which."
        )
        return
    rank = layout.rank(tensors[keys["lora_A"]].shape)
    expected = layout.file_shapes(rank)
    for part, key in keys.items():
        shape = tensors[key].shape
        if shape != expected[part]:
            yield (
                f"'{key}' has shape {shape}; expected {expected[part]} at rank {rank} for "
                f"'{named.path}' of shape {tuple(named.leaf.shape)}, whose rule has the kind "
                f"{rule.kind!r} and the axes {named.axes}.{_HINTS.get(rule.kind, '')}"
            )
            return
    configured = rank_of(config, _config_name(named, place))
    if rank != configured:
        yield f"'{keys['lora_A']}' has the rank {rank}, and the config gives it {configured}."


def _stack_problems(
    config: Mapping[str, Any], tensors: Tensors, leaf: PlannedLeaf
) -> Iterator[str]:
    """Says why the adapters of a stack can't be one node."""
    if not leaf.adapted or not leaf.named.stack:
        return
    named, places = leaf.named, sorted(leaf.adapted)
    whole = [place for place in named.places if place[:1] in {found[:1] for found in places}]
    if places != whole:
        missing = [named.name(place) for place in whole if place not in leaf.adapted]
        yield (
            f"'{named.path}' is a stack, of which the file does not adapt {listed(missing)}; "
            "expected all places beside one another to be adapted."
        )
    values: dict[str, list[Any]] = {
        "rank": [
            named.layout.rank(tensors[keys["lora_A"]].shape) for keys in leaf.adapted.values()
        ],
        "dtype": [[tensors[key].dtype for key in keys.values()] for keys in leaf.adapted.values()],
        "scale": [
            planned_scale(config, tensors, named, place, keys)
            for place, keys in leaf.adapted.items()
        ],
    }
    for what, found in values.items():
        differing = next((n for n, value in enumerate(found) if value != found[0]), None)
        if differing is not None:
            names = [named.name(place) for place in leaf.adapted]
            yield (
                f"'{named.path}' is a stack, which has one {what}, and '{names[0]}' and "
                f"'{names[differing]}' differ in it: {found[0]} and {found[differing]}. Expected "
                "the same, or params that hold these layers one by one."
            )


def _config_name(named: NamedLeaf, place: Place) -> str:
    """Returns by what name the patterns of a config know an adapter."""
    name = named.name(place)
    return name if named.rule.kind == "parameter" else name.removesuffix(".weight")
