"""What a file holds of one leaf, and what of it does not fit."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lora_jax._paths import listed
from lora_jax.exchange.peft._config import rank_of, scale_of
from lora_jax.exchange.peft._expert_layouts import file_layout
from lora_jax.exchange.peft._layout import Layout
from lora_jax.exchange.peft._places import NamedLeaf, Place
from lora_jax.exchange.peft._tensors import Tensors
from lora_jax.exchange.peft._tied import tied_in_file

# The key of each part of an adapter.
Keys = dict[str, str]

_HINTS = {
    "conv": " PEFT's adapter of a convolution with groups reads the channels of all groups, which "
    "no change of the grouped kernel does; lora_jax does not carry it.",
    "parameter": " The rules for a module's parameters must stand in the order in which PyTorch "
    "defines them.",
}


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


def leaf_problems(config: Mapping[str, Any], tensors: Tensors, leaf: PlannedLeaf) -> Iterable[str]:
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
    configured = rank_of(config, config_name(named, place))
    if rank != configured:
        yield f"'{keys['lora_A']}' has the rank {rank}, and the config gives it {configured}."


def _stack_problems(
    config: Mapping[str, Any], tensors: Tensors, leaf: PlannedLeaf
) -> Iterator[str]:
    """Says why the adapters of a stack can't be one node."""
    if not leaf.adapted:
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
    return scale_of(config, config_name(named, place), rank)


def config_name(named: NamedLeaf, place: Place) -> str:
    """Returns by what name the patterns of a config know an adapter."""
    name = named.name(place)
    return name if named.rule.kind == "parameter" else name.removesuffix(".weight")
