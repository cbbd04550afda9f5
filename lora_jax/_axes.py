"""The role of each axis of a weight, given by hand or found by `infer_axes`."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from lora_jax._paths import compile_expression, leaves_with_paths, listed, nearest_paths
from lora_jax._shapes import Axes
from lora_jax._tables import table
from lora_jax.quantization._weight import AnyWeight

_ROLES = ("in", "out", "batch")


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """One op that a weight reaches.

    Attributes:
      primitive: the name of the JAX primitive.
      source: the line of the model's own source.
      axes: the role of each of the weight's axes in a contraction, convolution or lookup; None
        where the op is another one, so that the use says nothing about the axes.
      is_output: whether the function's output depends on the weights through this op alone, as it
        does through a classifier's or a language model's head.
    """

    primitive: str
    source: str
    axes: Axes | None
    is_output: bool = False

    @property
    def is_product(self) -> bool:
        """Whether the weight is multiplied with an activation, rather than looked up."""
        return self.axes is not None and self.primitive != "gather"


class InferredAxes(Mapping[str, Axes]):
    """The axes of each weight whose uses agree, by path; made by `infer_axes`.

    Printed, it is a table. Two uses agree if they divide the axes into the same two sides: a tied
    embedding is looked up by row and multiplied transposed, and the same factors serve both. Where
    you know better, `axes | {"experts/kernel": ("batch", "in", "out")}` says so.

    Attributes:
      uses: for each floating-point leaf of two or more axes, every op that it reaches.
    """

    def __init__(
        self,
        uses: Mapping[str, tuple[WeightUse, ...]],
        given: Mapping[str, Axes] = MappingProxyType({}),
    ) -> None:
        """Takes the uses of each weight, and by path axes that hold whatever the uses say."""
        self.uses = dict(uses)
        self._given = dict(given)
        agreed = {path: _agreed_axes(found) for path, found in self.uses.items()}
        self._axes = {path: axes for path, axes in agreed.items() if axes is not None} | self._given

    def __or__(self, given: Mapping[str, Sequence[str]]) -> "InferredAxes":
        """Returns the same with other axes for some weights: `infer_axes(...) | {path: axes}`.

        Args:
          given: a mapping from path or expression to axes, as `wrap` takes it.

        Raises:
          ValueError: an expression matches no weight.
        """
        _check_expressions(given, self.uses)
        roles = {path: given_roles(path, given) for path in self.uses}
        found = {path: cast(Axes, tuple(each)) for path, each in roles.items() if each is not None}
        return InferredAxes(self.uses, self._given | found)

    def __getitem__(self, path: str) -> Axes:
        return self._axes[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._axes)

    def __len__(self) -> int:
        return len(self._axes)

    @property
    def disagreements(self) -> Mapping[str, tuple[WeightUse, ...]]:
        """The weights that are used in two ways whose sides differ, each with these uses."""
        contractions = {
            path: tuple(use for use in found if use.axes is not None)
            for path, found in self.uses.items()
        }
        return {
            path: found
            for path, found in contractions.items()
            if len(_sides(found)) > 1 and path not in self
        }

    @property
    def unused(self) -> tuple[str, ...]:
        """The weights that the function never uses."""
        return tuple(path for path, found in self.uses.items() if not found)

    @property
    def linear(self) -> tuple[str, ...]:
        """What `"all-linear"` means: each weight of a product or convolution, but the head.

        A weight that is combined with an array first, as in `x @ (W * mask)`, is not among them. A
        head inside of a loop is not distinguished from other layers. `print` shows every weight.
        """
        return tuple(
            path
            for path in self
            if any(use.is_product for use in self.uses[path])
            and not any(use.is_output for use in self.uses[path])
        )

    def reason_against(self, path: str) -> str:
        """Returns why a weight has no axes here, in words."""
        if path in self.disagreements:
            ways = [f"{use.axes} in {use.primitive} at {use.source}" for use in self.uses[path]]
            return f"its uses disagree: {listed(ways)}"
        if path in self.unused:
            return "the function never uses it"
        if path in self.uses:
            ways = [f"{use.primitive} at {use.source}" for use in self.uses[path]]
            return f"no product, convolution or lookup uses it, only {listed(ways)}"
        return "`infer_axes` did not see it"

    def __str__(self) -> str:
        rows = [
            (
                path,
                ", ".join(use.axes) if use.axes is not None else "",
                use.primitive,
                "output" if use.is_output else "",
                use.source,
            )
            for path, found in self.uses.items()
            for use in found or (WeightUse("never used", "", None),)
        ]
        return table(("path", "axes", "used in", "", "source"), rows)

    __repr__ = __str__


def _agreed_axes(uses: tuple[WeightUse, ...]) -> Axes | None:
    known = tuple(use for use in uses if use.axes is not None)
    if len(_sides(known)) != 1:
        return None
    return known[0].axes


def _sides(uses: tuple[WeightUse, ...]) -> set[frozenset[frozenset[int]]]:
    """Returns how these uses divide the axes, regardless of which side is which."""
    return {
        frozenset(
            frozenset(axis for axis, held in enumerate(use.axes) if held == role)
            for role in ("in", "out")
        )
        for use in uses
        if use.axes is not None
    }


def axes_of(path: str, leaf: AnyWeight, axes: Mapping[str, Sequence[str]] | None) -> Axes:
    """Returns the axes of a weight, as `axes` gives them or as its two axes must be.

    Raises:
      ValueError: `axes` gives none to a weight that needs them, or none that fit its shape.
    """
    if isinstance(axes, InferredAxes) and path not in axes:
        raise ValueError(
            f"`axes` has none for '{path}' of shape {leaf.shape}: {axes.reason_against(path)}. "
            "Leave it out of `targets`, or give its axes by hand."
        )
    roles = given_roles(path, axes or {})
    if roles is None:
        if leaf.ndim == 2:
            return ("in", "out")
        raise ValueError(
            f"`axes` is needed for '{path}' of shape {leaf.shape}: which of its {leaf.ndim} axes "
            "are inputs and which are outputs? Say so with wrap(..., axes={'" + path + "': "
            f"{('in',) * (leaf.ndim - 1) + ('out',)}}}) or whichever holds."
        )
    if len(roles) != leaf.ndim or not set(roles) <= set(_ROLES):
        raise ValueError(
            f"`axes` gives {tuple(roles)} for '{path}' of shape {leaf.shape}; expected one of "
            f"'in', 'out' or 'batch' for each of its {leaf.ndim} axes."
        )
    if "in" not in roles or "out" not in roles:
        raise ValueError(
            f"`axes` gives {tuple(roles)} for '{path}'; expected at least one 'in' and one 'out'."
        )
    return cast(Axes, tuple(roles))


def given_roles(path: str, axes: Mapping[str, Sequence[str]]) -> Sequence[str] | None:
    """Returns what `axes` has for a path: its own entry, or else the first matching expression."""
    if path in axes:
        return axes[path]
    for expression, roles in axes.items():
        if compile_expression(expression, "axes").search(path):
            return roles
    return None


def check_axes(axes: Any, params: Any) -> None:
    """Raises unless `axes` is what `wrap` takes, and every entry matches `params`."""
    if axes is None or isinstance(axes, InferredAxes):
        return
    if not isinstance(axes, Mapping):
        raise TypeError(
            f"`axes` is {axes!r}; expected a mapping from path or expression to the role of each "
            "axis, such as {'query/kernel': ('in', 'out', 'out')}, or what infer_axes returned."
        )
    _check_expressions(axes, [path for path, _ in leaves_with_paths(params)])


def _check_expressions(axes: Mapping[str, Any], paths: Iterable[str]) -> None:
    """Raises if a key of `axes` is neither a path nor an expression that matches one."""
    paths = list(paths)
    for expression in axes:
        pattern = compile_expression(expression, "axes")
        if expression not in paths and not any(pattern.search(path) for path in paths):
            raise ValueError(
                f"`axes` has {expression!r}, which matches no leaf; the nearest paths are "
                f"{listed(nearest_paths(expression, paths))}."
            )
