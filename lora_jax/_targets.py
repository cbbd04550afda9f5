"""Which leaves of a parameter tree `wrap` adapts, and with what settings of their own."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax._axes import InferredAxes
from lora_jax._paths import compile_expression, leaves_with_paths, listed, nearest_paths

Overrides = Mapping[str, Any]
Targets = str | Sequence[str] | Callable[[str, Any], bool] | Mapping[str, Overrides]

ALL_LINEAR = "all-linear"

# Leaves with these names shift a module's output. They may have two axes (the heads and the head
# dimension of an attention bias), and still a matched module does not mean them.
_BIAS_NAMES = frozenset({"bias", "b"})

# A name that no leaf has; an expression that matches it too means a module.
_NO_LEAF = "\0"


@dataclasses.dataclass(frozen=True)
class Selection:
    """How a leaf was selected.

    Attributes:
      overrides: the settings that its expression overrides.
      rank_may_shrink: whether a rank above the weight's smaller side becomes that side, because
        nobody has named this weight.
    """

    overrides: Overrides
    rank_may_shrink: bool = False


@dataclasses.dataclass(frozen=True)
class _Selector:
    """One expression or predicate of `targets`, and what it makes of the leaves that it matches."""

    description: str
    matches: Callable[[str, Any], bool]
    names_leaf: Callable[[str], bool]
    selection: Selection


def select(
    params: Any,
    targets: Targets,
    *,
    adaptable: Callable[[str, Any], bool],
    argument: str = "targets",
    expected: str = "a weight of two or more axes",
    biases: bool = False,
    inferred: InferredAxes | None = None,
) -> dict[str, Selection]:
    """Returns the paths that `targets` selects, and how; the first match counts.

    Args:
      params: the parameter tree.
      targets: an expression, a sequence of them, a predicate `(path, leaf)`, or a mapping from
        expression to overrides.
      adaptable: whether a matched leaf is one that can be selected.
      argument: the name of the argument, for errors.
      expected: what `adaptable` asks for, in words.
      biases: whether a matched module means its biases too.
      inferred: what is known of how the weights are used; `"all-linear"` needs it.

    Raises:
      ValueError: an expression matches nothing, or nothing that is adaptable.
      TypeError: `targets` has none of these forms.
    """
    leaves = leaves_with_paths(params)
    selected: dict[str, Selection] = {}
    for selector in _selectors(targets, argument, inferred):
        matched = [(path, leaf) for path, leaf in leaves if selector.matches(path, leaf)]
        chosen = [
            path
            for path, leaf in matched
            if adaptable(path, leaf) and (biases or selector.names_leaf(path) or not _is_bias(path))
        ]
        if not matched:
            raise ValueError(_no_match(selector, [path for path, _ in leaves], argument))
        if not chosen:
            raise ValueError(
                f"`{argument}`: {selector.description} matches "
                f"{listed([_described(path, leaf, inferred) for path, leaf in matched])}, "
                f"of which none is {expected}."
            )
        if isinstance(targets, Mapping) and all(path in selected for path in chosen):
            raise ValueError(
                f"`{argument}`: all that {selector.description} matches is matched before, and the "
                "first match counts; put it first."
            )
        for path in chosen:
            selected.setdefault(path, selector.selection)
    return selected


def _selectors(targets: Targets, argument: str, inferred: InferredAxes | None) -> list[_Selector]:
    if isinstance(targets, str):
        return [_expression_selector(targets, {}, argument, inferred)]
    if isinstance(targets, Mapping):
        return [
            _expression_selector(expression, overrides, argument, inferred)
            for expression, overrides in targets.items()
        ]
    if callable(targets):
        return [_Selector("the predicate", targets, lambda path: True, Selection({}))]
    if isinstance(targets, Sequence) and targets:
        return [_expression_selector(expression, {}, argument, inferred) for expression in targets]
    raise TypeError(
        f"`{argument}` is {targets!r}; expected a regular expression, a sequence of them, a "
        "function (path, leaf) -> bool, or a mapping from expression to overrides."
    )


def _expression_selector(
    expression: Any, overrides: Any, argument: str, inferred: InferredAxes | None
) -> _Selector:
    if not isinstance(expression, str):
        raise TypeError(f"`{argument}` holds {expression!r}; expected a regular expression.")
    if not isinstance(overrides, Mapping):
        raise TypeError(
            f"`{argument}` maps {expression!r} to {overrides!r}; expected overrides such as "
            "dict(rank=16)."
        )
    if expression == ALL_LINEAR:
        return _all_linear_selector(overrides, argument, inferred)
    pattern = compile_expression(expression, argument)
    return _Selector(
        description=f"the expression {expression!r}",
        matches=lambda path, leaf: pattern.search(path) is not None,
        names_leaf=lambda path: _names_leaf(pattern, path),
        selection=Selection(overrides),
    )


def _all_linear_selector(
    overrides: Overrides, argument: str, inferred: InferredAxes | None
) -> _Selector:
    if inferred is None:
        raise ValueError(
            f"`{argument}` is 'all-linear', which needs to know how the function uses its weights: "
            "wrap(params, 'all-linear', axes=lora_jax.infer_axes(fn, params, *args))."
        )
    return _Selector(
        description="'all-linear'",
        matches=lambda path, leaf: path in inferred.linear,
        names_leaf=lambda path: True,
        selection=Selection(overrides, rank_may_shrink=True),
    )


def _described(path: str, leaf: Any, inferred: InferredAxes | None) -> str:
    described = f"{path} {tuple(jnp.shape(leaf))}"
    if inferred is None or path in inferred or jnp.ndim(leaf) < 2:
        return described
    return f"{described}: {inferred.reason_against(path)}"


def _no_match(selector: _Selector, paths: list[str], argument: str) -> str:
    wanted = selector.description.removeprefix("the expression ").strip("'\"")
    return (
        f"`{argument}`: {selector.description} matches no leaf. It must match whole segments of a "
        f"path; the nearest paths are {listed(nearest_paths(wanted, paths))}."
    )


def _names_leaf(pattern: re.Pattern[str], path: str) -> bool:
    """Says whether an expression means this leaf, and not just any leaf of its module."""
    module = path.rpartition("/")[0]
    any_leaf = f"{module}/{_NO_LEAF}" if module else _NO_LEAF
    return _matches_to_the_end(pattern, path) and not _matches_to_the_end(pattern, any_leaf)


def _matches_to_the_end(pattern: re.Pattern[str], path: str) -> bool:
    return any(match.end() == len(path) for match in pattern.finditer(path))


def _is_bias(path: str) -> bool:
    return path.rpartition("/")[2] in _BIAS_NAMES
