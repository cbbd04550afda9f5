"""The forms of `targets`, and which leaves of a parameter tree they select."""

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

# A name that no leaf has; an expression that also matches below it means a module.
_NO_LEAF = "\0"


@dataclasses.dataclass(frozen=True)
class Selection:
    """How a leaf was selected.

    Attributes:
      overrides: the settings that its expression overrides.
      rank_may_shrink: whether a rank above the weight's smaller side becomes that side, because
        no expression names this weight.
      names_leaf: whether the expression means this leaf, and not just any leaf of its module.
    """

    overrides: Overrides
    rank_may_shrink: bool = False
    names_leaf: bool = True


@dataclasses.dataclass(frozen=True)
class _Selector:
    """One expression or predicate of `targets`, and how it selects the leaves that it matches."""

    description: str
    matches: Callable[[str, Any], bool]
    names_leaf: Callable[[str], bool]
    selection: Selection


def select(
    params: Any,
    targets: Targets,
    *,
    obstacle: Callable[[str, Any, bool], str | None],
    expected: str,
    argument: str = "targets",
    inferred: InferredAxes | None = None,
) -> dict[str, Selection]:
    """Returns the paths that `targets` selects, and how; the first match counts.

    Args:
      params: the parameter tree.
      targets: an expression, a sequence of them, a predicate `(path, leaf)`, or a mapping from
        expression to overrides.
      obstacle: why a matched leaf can't be selected, or None if it can, from its path, the leaf,
        and whether the expression names this leaf and not just its module.
      expected: what can be selected, in words.
      argument: the name of the argument, for errors.
      inferred: what is known of how the weights are used; `"all-linear"` needs it.

    Raises:
      ValueError: an expression matches nothing, or nothing that can be selected.
      TypeError: `targets` has none of these forms.
    """
    leaves = leaves_with_paths(params)
    selected: dict[str, Selection] = {}
    for selector in _selectors(targets, argument, inferred):
        matched = [(path, leaf) for path, leaf in leaves if selector.matches(path, leaf)]
        if not matched:
            raise ValueError(_no_match(selector, [path for path, _ in leaves], argument))
        obstacles = {
            path: obstacle(path, leaf, selector.names_leaf(path)) for path, leaf in matched
        }
        chosen = [path for path, reason in obstacles.items() if reason is None]
        if not chosen:
            described = [f"{path} {jnp.shape(leaf)}: {obstacles[path]}" for path, leaf in matched]
            possible = [path for path, leaf in leaves if obstacle(path, leaf, True) is None]
            raise ValueError(
                f"`{argument}`: {selector.description} matches {listed(described)}; none of these "
                f"is {expected}" + _nearest(selector, possible, ". The nearest that are: ")
            )
        if isinstance(targets, Mapping) and all(path in selected for path in chosen):
            raise ValueError(
                f"`{argument}`: all that {selector.description} matches has been matched before, "
                "and the first match counts; put it first."
            )
        for path in chosen:
            names_leaf = selector.names_leaf(path)
            selected.setdefault(
                path, dataclasses.replace(selector.selection, names_leaf=names_leaf)
            )
    return selected


def check_no_overrides(selected: Mapping[str, Selection], argument: str, subject: str) -> None:
    """Raises if a selection has settings, which `subject` does not take."""
    for path, selection in selected.items():
        if selection.overrides:
            raise ValueError(
                f"`{argument}` overrides {listed(list(selection.overrides))} for '{path}'; "
                f"{subject} has no settings."
            )


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


def _no_match(selector: _Selector, paths: list[str], argument: str) -> str:
    return (
        f"`{argument}`: {selector.description} matches no leaf. It must match whole segments of a "
        f"path" + _nearest(selector, paths, "; the nearest paths are ")
    )


def _nearest(selector: _Selector, paths: Sequence[str], introduction: str) -> str:
    """Returns the end of an error, with those of `paths` that are the most like an expression."""
    if not paths:
        return "."
    wanted = selector.description.removeprefix("the expression ").strip("'\"")
    return f"{introduction}{listed(nearest_paths(wanted, paths))}."


def _names_leaf(pattern: re.Pattern[str], path: str) -> bool:
    """Says whether an expression means this leaf, and not just any leaf of its module."""
    module = path.rpartition("/")[0]
    any_leaf = f"{module}/{_NO_LEAF}" if module else _NO_LEAF
    return _matches_to_the_end(pattern, path) and not _matches_to_the_end(pattern, any_leaf)


def _matches_to_the_end(pattern: re.Pattern[str], path: str) -> bool:
    return any(match.end() == len(path) for match in pattern.finditer(path))
