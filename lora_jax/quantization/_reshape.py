"""Splitting and joining the axes of a quantised weight, without touching a number."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Regrouped:
    """Where the axes of a weight go that is reshaped, blocked axes and features apart.

    Attributes:
      blocked: the new blocked axes in the order in which they are flattened, counted from the end.
      blocked_shape: their sizes.
      features: the new feature axes in the order in which the arrays have them, from the end.
      feature_shape: their sizes.
      feature_order: the order of the old features in which reshaping them gives the new ones.
    """

    blocked: tuple[int, ...]
    blocked_shape: Shape
    features: tuple[int, ...]
    feature_shape: Shape
    feature_order: tuple[int, ...]


def regrouped(
    shape: Shape, new_shape: Shape, blocked: Sequence[int], features: Sequence[int]
) -> Regrouped:
    """Returns where the axes go if a weight of `shape` gets `new_shape`.

    The shapes fall into groups of neighbours with equal products, in each of which axes are joined
    and split. So each group must be of blocked axes alone, which are flattened in this order, or of
    features alone.

    Args:
      shape: the shape without the batch axes.
      new_shape: the one to have.
      blocked: the blocked axes, in the order in which they are flattened, counted from the end.
      features: the feature axes in the order in which the arrays have them, from the end.

    Raises:
      ValueError: the shapes have other numbers of weights, or a group mixes the two kinds of axes
        or has blocked axes that are not flattened in this order.
    """
    ndim, new_ndim = len(shape), len(new_shape)
    new_blocked: dict[int, tuple[int, ...]] = {}
    new_features: dict[int, tuple[int, ...]] = {}
    joined: dict[int, tuple[int, ...]] = {}
    for old, new in _groups(shape, new_shape):
        from_end = tuple(axis - ndim for axis in old)
        real = tuple(axis for axis in from_end if shape[axis] != 1) or from_end[:1]
        ends = tuple(axis - new_ndim for axis in new)
        if all(axis in features for axis in real):
            joined[real[0]], new_features[real[0]] = real, ends
        elif _are_flattened_in_order(real, blocked, shape):
            new_blocked[real[0]] = ends
        else:
            raise ValueError(
                f"`shape` joins the axes {old} of the sizes {tuple(shape[axis] for axis in old)}, "
                "which codes and scales don't have side by side; expected neighbours of one "
                "kind: inputs that share scales, or outputs. weight.dequantize() can be reshaped "
                "at will."
            )
    order = [axis for axis in features if axis in joined]
    in_order = [each for axis in order for each in joined[axis]]
    # What is left are axes of size 1, whose place does not matter.
    in_order += [axis for axis in features if axis not in in_order]
    own_blocked = [each for axis in blocked for each in new_blocked.get(axis, ())]
    own_features = [each for axis in order for each in new_features[axis]]
    return Regrouped(
        blocked=tuple(own_blocked),
        blocked_shape=tuple(new_shape[axis] for axis in own_blocked),
        features=tuple(own_features),
        feature_shape=tuple(new_shape[axis] for axis in own_features),
        feature_order=tuple(list(features).index(axis) for axis in in_order),
    )


def completed(shape: Sequence[int], size: int) -> Shape:
    """Returns a shape with the size that stands for -1 in it, as NumPy has it.

    Raises:
      ValueError: a weight of this many numbers can't have the shape.
    """
    known = math.prod(each for each in shape if each != -1)
    count = list(shape).count(-1)
    found = tuple(size // max(known, 1) if each == -1 else each for each in shape)
    if count > 1 or any(each < -1 for each in shape) or math.prod(found) != size:
        raise ValueError(f"`shape` is {tuple(shape)}; expected one of {size} weights.")
    return found


def _groups(shape: Shape, new_shape: Shape) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns the smallest groups of neighbours that hold as many weights in both shapes."""
    groups: list[tuple[list[int], list[int]]] = []
    start, new_start = 0, 0
    while start < len(shape):
        old, new = [start], [new_start] if new_start < len(new_shape) else []
        start, new_start = start + 1, new_start + len(new)
        while (held := _product(shape, old)) != (wanted := _product(new_shape, new)):
            if held < wanted:
                old.append(start)
                start += 1
            else:
                new.append(new_start)
                new_start += 1
        groups.append((old, new))
    groups[-1][1].extend(range(new_start, len(new_shape)))
    return [(tuple(old), tuple(new)) for old, new in groups]


def _product(shape: Shape, axes: Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _are_flattened_in_order(axes: Sequence[int], blocked: Sequence[int], shape: Shape) -> bool:
    """Says whether nothing but axes of size 1 is between these where the blocked are flattened."""
    real: Mapping[Any, int] = {
        axis: place
        for place, axis in enumerate(axis for axis in blocked if shape[axis] != 1 or axis in axes)
    }
    places = [real.get(axis, -1) for axis in axes]
    return places[0] >= 0 and places == list(range(places[0], places[0] + len(places)))
