"""Rules: what a parameter of a PyTorch model is called, and where it is in a parameter tree."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from lora_jax._paths import listed
from lora_jax._shapes import AxisRole

Kind = Literal["linear", "embedding", "conv", "parameter", "array"]

# {layer}, or {layer:\d+} with the regular expression that its text must match.
_FIELD = re.compile(r"\{(\w+)(?::((?:[^{}]|\{[\d,]+\})+))?\}")
_ONE_SEGMENT = "[^/]+"
_WORDS = re.compile(r"\w+(?:\|\w+)+")


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""What parameters of a PyTorch model are called, and where they are in a parameter tree.

    Both are templates with the same fields, so that a rule serves both directions:
    `Rule("encoder.layer.{layer}.output.dense.weight", "encoder/layer_{layer}/output/dense/kernel")`
    A field stands for the text of one segment or a part of it, or for what its regular expression
    matches: `{projection:query|key|value}`, `{layer:\d+}`, `{module:.+}` for any number of
    segments, with dots in the name where the path has slashes. A field that only the name has
    numbers the places of a stack: `layers.{layer}.dense.weight` at the path
    `layers/dense/kernel` is one PyTorch parameter for each place of the kernel's batch axis. If its
    expression is a choice of words, they name the places: `attention.{name:k|v}_proj.weight` at
    the path `attention/key_value` is two PyTorch parameters.

    Attributes:
      name: the parameter's name in the PyTorch model's `state_dict`, without `base_model.model.`.
      path: the leaf's path in the parameter tree.
      kind: how PyTorch holds it: `"linear"` (out, in), or (out,) for a bias or a norm;
        `"embedding"` (in, out), where in is the vocabulary; `"conv"` (out, in, \*window);
        `"parameter"`, a weight without a module of its own, such as a stack of experts
        (experts, out, in); `"array"`, as the tree has it.
      transposed: whether a linear weight is stored (in, out), as in Hugging Face's `Conv1D`, or one
        of experts (experts, in, out), of which the module then says `is_transposed`.
      axes: the role of each of the leaf's axes, as in `wrap`. Several `"in"` or `"out"` axes are
        one flat axis in PyTorch, in the same order: heads and head dimension, say. Unless given,
        the axes of the stack come first, and (in, out) or (out,) follows.
      tied: whether the leaf is another parameter too, such as an embedding that the output layer
        shares. PEFT adapts each of the two by itself, but one leaf is both: files that adapt or
        train only one of them are refused. If the other's name is given, such as
        `"lm_head.weight"`, files load in which both are adapted alike (`ensure_weight_tying`), and
        `save` writes such files.

    Source: Hugging Face PEFT, developer guide "PEFT checkpoint format".

    Examples:
      >>> from lora_jax.exchange import peft
      >>> rule = peft.Rule("layers.{layer}.{name}.weight", "layer_{layer}/{name:query|key}/kernel")
      >>> rule.fields_of("layer_3/query/kernel")
      {'layer': '3', 'name': 'query'}
      >>> rule.named({"layer": "3", "name": "query"})
      'layers.3.query.weight'
    """

    name: str
    path: str
    kind: Kind = dataclasses.field(default="linear", kw_only=True)
    transposed: bool = dataclasses.field(default=False, kw_only=True)
    axes: Sequence[AxisRole] | None = dataclasses.field(default=None, kw_only=True)
    tied: bool | str = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Raises a ValueError if the rule contradicts itself."""
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"`kind` is {self.kind!r} in the rule for {self.name!r}; expected one of "
                f"{listed(get_args(Kind))}."
            )
        if self.transposed and self.kind not in {"linear", "parameter"}:
            raise ValueError(
                f"`transposed` is True in the rule for {self.name!r}, whose kind is {self.kind!r}; "
                "expected it of 'linear' and 'parameter' only."
            )
        unknown = [field for field in _fields(self.path) if field not in _fields(self.name)]
        if unknown:
            raise ValueError(
                f"the rule for {self.name!r} has {listed(unknown)} in its path {self.path!r} only; "
                "expected every field of the path in the name, which is made of them."
            )
        if self.tied:
            self._check_tied()
        if self.axes is not None:
            object.__setattr__(self, "axes", tuple(self.axes))
        _ = self._pattern

    @property
    def path_fields(self) -> tuple[str, ...]:
        """The fields of the path; without any, it is that of one leaf."""
        return tuple(_fields(self.path))

    @property
    def stack_fields(self) -> tuple[str, ...]:
        """The fields that number places of a stack, in the order of the stack's axes."""
        in_path = _fields(self.path)
        return tuple(field for field in _fields(self.name) if field not in in_path)

    @functools.cached_property
    def stack_words(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the places of a stack, by the field, where they are not numbered."""
        expressions = _expressions(self.name)
        return {
            field: tuple(expressions[field].split("|"))
            for field in self.stack_fields
            if _WORDS.fullmatch(expressions.get(field, ""))
        }

    @property
    def tied_name(self) -> str | None:
        """The template of the other parameter's name, where the leaf is two and it is known."""
        return self.tied if isinstance(self.tied, str) else None

    def _check_tied(self) -> None:
        if self.kind not in {"linear", "embedding"} or self.transposed or self.stack_fields:
            raise ValueError(
                f"`tied` is {self.tied!r} in the rule for {self.name!r}; expected it of a weight "
                "that an 'embedding' and a 'linear' share, neither transposed nor a stack."
            )
        if self.tied_name is not None and _fields(self.tied_name) != _fields(self.name):
            raise ValueError(
                f"`tied` is {self.tied!r} in the rule for {self.name!r}; expected True, or a name "
                "with the same fields."
            )

    def fields_of(self, path: str) -> dict[str, str] | None:
        """Returns the text of each field in a leaf's path, or None where the path is another."""
        found = self._pattern.fullmatch(path)
        return None if found is None else found.groupdict()

    def fields_at(self, place: Sequence[int]) -> dict[str, str]:
        """Returns the text of each field that only the name has, at one place of the stack."""
        return {
            field: self.stack_words[field][number] if field in self.stack_words else str(number)
            for field, number in zip(self.stack_fields, place, strict=True)
        }

    def named(self, fields: Mapping[str, str]) -> str:
        """Returns the PyTorch name with these fields."""
        return _filled(self.name, fields)

    def named_tied(self, fields: Mapping[str, str]) -> str | None:
        """Returns the other PyTorch name with these fields, where it is known."""
        return None if self.tied_name is None else _filled(self.tied_name, fields)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        expressions = {**_expressions(self.name), **_expressions(self.path)}
        seen: set[str] = set()

        def of_field(found: re.Match[str]) -> str:
            name = found[1]
            if name in seen:
                return f"(?P={name})"
            seen.add(name)
            return f"(?P<{name}>{expressions.get(name, _ONE_SEGMENT)})"

        try:
            return re.compile(_substituted(self.path, of_field, re.escape))
        except re.error as error:
            raise ValueError(
                f"the rule for {self.name!r} has a field that is not a regular expression: {error}."
            ) from error


def _fields(template: str) -> dict[str, None]:
    """Returns the names of the fields of a template, in order, each once."""
    return dict.fromkeys(found[1] for found in _FIELD.finditer(template))


def _filled(template: str, fields: Mapping[str, str]) -> str:
    """Returns a name's template with the text of its fields."""
    return _FIELD.sub(lambda found: fields[found[1]].replace("/", "."), template)


def _expressions(template: str) -> dict[str, str]:
    """Returns the expressions that fields are given, with slashes for the dots between segments."""
    return {
        found[1]: found[2].replace(r"\.", "/").replace("[^.]", "[^/]")
        for found in _FIELD.finditer(template)
        if found[2]
    }


def _substituted(
    template: str, of_field: Callable[[re.Match[str]], str], of_text: Callable[[str], str]
) -> str:
    """Returns a template with each field and the text between them replaced."""
    parts, end = [], 0
    for found in _FIELD.finditer(template):
        parts += [of_text(template[end : found.start()]), of_field(found)]
        end = found.end()
    return "".join([*parts, of_text(template[end:])])
