"""What is known of how a function uses each weight: the result of `infer_axes`."""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from lora_jax._paths import listed
from lora_jax._shapes import Axes
from lora_jax._tables import table


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """One op that a weight reaches.

    Attributes:
      primitive: the name of the JAX primitive.
      source: the line of the model's own source.
      axes: the role of each of the weight's axes in a contraction, convolution or lookup; None
        where the op is none of these, so that the use says nothing of the axes.
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

    Printed, it is a table. Two uses agree if they part the axes into the same two sides: a tied
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
        """Takes the uses of each weight, and axes that hold whatever the uses say."""
        self.uses = dict(uses)
        agreed = {path: _agreed_axes(found) for path, found in self.uses.items()}
        self._axes = {path: axes for path, axes in agreed.items() if axes is not None} | dict(given)

    def __or__(self, given: Mapping[str, Axes]) -> "InferredAxes":
        """Returns the same with other axes for some paths: `infer_axes(...) | {path: axes}`."""
        return InferredAxes(self.uses, dict(given))

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

        A weight that meets an array on its way, as in `x @ (W * mask)`, is not among them, nor is a
        head inside of a loop told from other layers. `print` shows what became of every weight.
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
    """Returns how these uses part the axes, regardless of which side is which."""
    return {
        frozenset(
            frozenset(axis for axis, held in enumerate(use.axes) if held == role)
            for role in ("in", "out")
        )
        for use in uses
        if use.axes is not None
    }
