"""Which leaf of a tree is which parameter of a PyTorch model, and by which keys a file has it."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import numpy as np

from lora_jax._axes import given_roles
from lora_jax._folders import CheckpointError
from lora_jax._nodes import NodeIndex
from lora_jax._paths import listed
from lora_jax._processes import is_shared, on_host
from lora_jax._row_selection import selects_rows
from lora_jax._shapes import Axes, AxisRole, positions
from lora_jax._weight import is_lora_weight
from lora_jax.exchange.peft._layout import Layout, exchanged_for_tokens
from lora_jax.exchange.peft._rules import Rule

Part = Literal["lora_A", "lora_B", "magnitude", "rows", "weight", "base", "unused", "unknown"]

PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer"
_OF_ROWS = ".token_adapter"

_SUFFIXES: dict[str, tuple[Part, bool]] = {
    "lora_A.weight": ("lora_A", False),
    "lora_B.weight": ("lora_B", False),
    "lora_embedding_A": ("lora_A", True),
    "lora_embedding_B": ("lora_B", True),
    "lora_magnitude_vector": ("magnitude", False),
    "lora_magnitude_vector.weight": ("magnitude", False),
    f"{_OF_ROWS[1:]}.trainable_tokens_delta": ("rows", False),
}
_ADAPTED = re.compile(
    rf"(?P<module>.+?)(?P<wrappers>(?:{re.escape(_BASE_LAYER)})*)"
    rf"\.(?P<suffix>{'|'.join(map(re.escape, _SUFFIXES))})"
)

Place = tuple[int, ...]
GivenAxes = Mapping[str, Sequence[str]] | None


@dataclasses.dataclass(frozen=True)
class NamedLeaf:
    """A leaf with a rule, and the PyTorch parameters that it holds.

    Attributes:
      path: its path.
      leaf: the array, or the node that `wrap` made of it.
      rule: the first rule whose path it has.
      fields: the text of the rule's fields in the path.
      axes: the role of each axis; None where they are not known.
    """

    path: str
    leaf: Any
    rule: Rule
    fields: Mapping[str, str]
    axes: Axes | None

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes of the leaf along which it stacks PyTorch parameters."""
        count = len(self.rule.stack_fields)
        return tuple(range(count)) if self.axes is None else positions(self.axes, "batch")[:count]

    @property
    def places(self) -> Iterator[Place]:
        """Every place of the stack; the one place () of a leaf that is not a stack."""
        return itertools.product(*(range(self.leaf.shape[axis]) for axis in self.stack))

    @property
    def template(self) -> str:
        """The name of its parameters, with the fields that number the stack left open."""
        return self.rule.named(
            {**{name: f"{{{name}}}" for name in self.rule.stack_fields}, **self.fields}
        )

    def name(self, place: Place) -> str:
        """Returns the name of the PyTorch parameter at one place."""
        return self.rule.named({**self.fields, **self.rule.fields_at(place)})

    @property
    def tied_name(self) -> str | None:
        """The name of the other PyTorch parameter, where the leaf is two and the name is known."""
        return self.rule.named_tied(self.fields)

    @property
    def layout(self) -> Layout:
        """How PyTorch and the tree lay out each of the parameters.

        Raises:
          CheckpointError: the axes are not known, or can't be those of the leaf.
        """
        problem = self.problem()
        if problem is not None:
            raise CheckpointError(problem)
        return self._layout

    def problem(self) -> str | None:
        """Returns what is wrong with the axes, and the call that fixes it, or None."""
        subject = f"'{self.path}' of shape {tuple(self.leaf.shape)}"
        remedy = f"Say so with Rule({self.rule.name!r}, {self.rule.path!r}, axes=...)"
        if self.axes is None:
            return (
                f"`names` has no axes for {subject}: which are inputs and which outputs? {remedy}, "
                "such as axes=('in', 'out', 'out'), or with axes=lora_jax.infer_axes(...)."
            )
        if len(self.axes) != len(self.leaf.shape) or not set(self.axes) <= set(get_args(AxisRole)):
            return (
                f"{subject} has the axes {self.axes}; expected 'in', 'out' or 'batch' for each. "
                f"{remedy}."
            )
        stacked, batch = len(self.rule.stack_fields), self.axes.count("batch")
        experts = batch - stacked
        if experts < 0 or experts > (1 if self.rule.kind == "parameter" else 0):
            return (
                f"{subject} has the axes {self.axes}, of which {batch} are 'batch'; expected "
                f"{stacked}, one for each field that only the name has: "
                f"{listed(self.rule.stack_fields) or 'none'}. A stack of experts has the kind "
                f"'parameter'. {remedy}."
            )
        misfit = self._layout.problem()
        return (
            None
            if misfit is None
            else f"{subject} is not a {self.rule.kind!r}: {misfit}. {remedy}."
        )

    @property
    def _layout(self) -> Layout:
        assert self.axes is not None
        kept = [axis for axis in range(len(self.axes)) if axis not in self.stack]
        shape, axes = self.leaf.shape, self.axes
        return Layout(
            self.rule.kind,
            self.rule.transposed,
            tuple(shape[axis] for axis in kept),
            tuple(axes[axis] for axis in kept),
        )


@dataclasses.dataclass(frozen=True)
class NamedTree:
    """A parameter tree whose leaves have PyTorch names.

    Attributes:
      leaves: the leaves with a rule, in the order of the rules.
      without_rule: the paths of the others.
      idle_rules: the rules whose paths no leaf has.
      by_name: leaf and place of each PyTorch name; of a leaf that is two parameters, by both.
    """

    leaves: tuple[NamedLeaf, ...]
    without_rule: tuple[str, ...]
    idle_rules: tuple[Rule, ...]
    by_name: Mapping[str, tuple[NamedLeaf, Place]]


@dataclasses.dataclass(frozen=True)
class Key:
    """What a tensor of an adapter file is.

    Attributes:
      name: the adapted module, or for a weight the PyTorch parameter.
      part: a part of an adapter; the `"rows"` of single tokens; a `"weight"` that was trained in
        full; a copy of a `"base"` weight; `"unused"` where PEFT doesn't compute with it; or
        `"unknown"`.
      is_embedding: whether an embedding was adapted.
      depth: how many adapters of the module's own parameters are around this one.
    """

    name: str
    part: Part
    is_embedding: bool = False
    depth: int = 0


def named_tree(tree: Any, names: Sequence[Rule], axes: GivenAxes) -> NamedTree:
    """Returns the leaves of `tree` with the names that the rules give them.

    Raises:
      TypeError: `names` is not a sequence of rules.
      ValueError: two leaves have the same name.
    """
    _check_rules(names)
    rule_of = _FirstRule(names)
    found: list[list[NamedLeaf]] = [[] for _ in names]
    without_rule = []
    for path, leaf in NodeIndex.of(tree).tree.items():
        if not hasattr(leaf, "shape"):
            continue
        match = rule_of(path)
        if match is None:
            without_rule.append(path)
            continue
        number, fields = match
        rule = names[number]
        named = NamedLeaf(path, leaf, rule, fields, _axes_of(rule, path, leaf, axes))
        _check_stack(named)
        found[number].append(named)
    leaves = tuple(itertools.chain.from_iterable(found))
    return NamedTree(
        leaves=leaves,
        without_rule=tuple(without_rule),
        idle_rules=tuple(rule for rule, has in zip(names, found, strict=True) if not has),
        by_name=_by_name(leaves),
    )


class _FirstRule:
    """The first of some rules that a path has; those without fields are found by the path itself.

    A rule for each leaf, as of a U-Net, would otherwise be a product of both numbers.
    """

    def __init__(self, names: Sequence[Rule]) -> None:
        self._whole: dict[str, int] = {}
        self._patterns = []
        for number, rule in enumerate(names):
            if rule.path_fields:
                self._patterns.append((number, rule))
            else:
                self._whole.setdefault(rule.path, number)

    def __call__(self, path: str) -> tuple[int, dict[str, str]] | None:
        """Returns the rule's number, and the text of each of its fields."""
        whole = self._whole.get(path)
        for number, rule in self._patterns:
            if whole is not None and whole < number:
                break
            fields = rule.fields_of(path)
            if fields is not None:
                return number, fields
        return None if whole is None else (whole, {})


def taken(leaf: Any, named: NamedLeaf, place: Place) -> np.ndarray:
    """Returns one place of a stack, which alone is gathered from other processes."""
    index: list[int | slice] = [slice(None)] * leaf.ndim
    for axis, number in zip(named.stack, place, strict=True):
        index[axis] = number
    if is_shared(leaf):
        return on_host(leaf[tuple(index)])
    return np.asarray(np.asarray(leaf)[tuple(index)])


def parsed(key: str) -> Key:
    """Returns what the tensor with this key is."""
    name = key.removeprefix(PREFIX)
    adapted = _ADAPTED.fullmatch(name)
    if adapted is not None:
        part, is_embedding = _SUFFIXES[adapted["suffix"]]
        depth = adapted["wrappers"].count(_BASE_LAYER)
        return Key(adapted["module"], part, is_embedding, depth)
    if re.search(r"(^|\.)lora_", name):
        return Key(name, "unknown")
    # With bias="all", PEFT also writes the biases inside of the wrappers of `modules_to_save`.
    if ".original_module." in name:
        return Key(name, "unused")
    plain = name.replace(f"{_OF_ROWS}{_BASE_LAYER}", _BASE_LAYER)
    plain = plain.replace(_BASE_LAYER, "").replace(".modules_to_save.", ".")
    is_base = plain != name and _BASE_LAYER in name and not name.endswith(".bias")
    return Key(plain, "base" if is_base else "weight")


def adapter_key(module: str, part: Part, *, is_embedding: bool, depth: int) -> str:
    """Returns the key of a part of an adapter."""
    suffix = next(
        suffix
        for suffix, (own, embedding) in _SUFFIXES.items()
        if own == part and (embedding == is_embedding or part == "magnitude")
    )
    return f"{PREFIX}{module}{_BASE_LAYER * depth}.{suffix}"


def bias_key(module: str, *, wrappers: int) -> str:
    """Returns the key of a module's bias, with that many adapters around the module."""
    return f"{PREFIX}{module}{_BASE_LAYER * wrappers}.bias"


def _check_rules(names: Any) -> None:
    is_sequence = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_sequence or not all(isinstance(rule, Rule) for rule in names):
        raise TypeError(
            f"`names` is {names!r}; expected a sequence of rules, such as "
            "[Rule('layer.{layer}.query.weight', 'layer_{layer}/query/kernel')]."
        )


def _check_stack(leaf: NamedLeaf) -> None:
    fields, axes = leaf.rule.stack_fields, leaf.stack
    if len(axes) != len(fields) or not all(axis < len(leaf.leaf.shape) for axis in axes):
        raise ValueError(
            f"`names` has the rule {leaf.rule.name!r} for '{leaf.path}' of shape "
            f"{tuple(leaf.leaf.shape)} with the axes {leaf.axes}; expected a batch axis for each "
            f"field that only the name has: {listed(fields)}."
        )
    for field, axis in zip(fields, axes, strict=True):
        words, size = leaf.rule.stack_words.get(field), leaf.leaf.shape[axis]
        if words is not None and len(words) != size:
            raise ValueError(
                f"`names` has the rule {leaf.rule.name!r} for '{leaf.path}' of shape "
                f"{tuple(leaf.leaf.shape)}, whose axis {axis} has {size} places; expected one for "
                f"each of {listed(words)}, which name them."
            )


def _by_name(leaves: Iterable[NamedLeaf]) -> dict[str, tuple[NamedLeaf, Place]]:
    by_name: dict[str, tuple[NamedLeaf, Place]] = {}
    for leaf in leaves:
        names = [(leaf.name(place), place) for place in leaf.places]
        tied = [] if leaf.tied_name is None else [(leaf.tied_name, ())]
        for name, place in (*names, *tied):
            if name in by_name:
                raise ValueError(
                    f"`names` gives '{by_name[name][0].path}' and '{leaf.path}' the same PyTorch "
                    f"name '{name}'; expected a name of its own for each, by a field of the path "
                    "in the name or a rule of its own."
                )
            by_name[name] = leaf, place
    return by_name


def _axes_of(rule: Rule, path: str, leaf: Any, given: GivenAxes) -> Axes | None:
    if is_lora_weight(leaf):
        is_of_rows = selects_rows(leaf)
        return exchanged_for_tokens(rule.kind, leaf.axes) if is_of_rows else leaf.axes
    if rule.axes is not None:
        return tuple(rule.axes)
    roles = given_roles(path, given or {})
    if roles is not None:
        return cast(Axes, tuple(roles))
    stacked = len(rule.stack_fields)
    own = len(leaf.shape) - stacked
    if own < 0:
        return None
    is_vector = rule.kind == "array" or own < 2
    if own > 2 and not is_vector:
        return None
    return cast(Axes, (*("batch",) * stacked, *(("out",) * own if is_vector else ("in", "out"))))
