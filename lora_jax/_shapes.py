"""How the axes of a weight, its factors and its magnitude correspond."""

import math
import string
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax._compat import mesh_of

AxisRole = Literal["in", "out", "batch"]
Axes = tuple[AxisRole, ...]
Layers = tuple[int, ...]
# What a tree may hold before JAX has seen it.
AnyArray = Array | np.ndarray
# An int, also one of NumPy, or a dimension of `jax.export.symbolic_shape`, whose type is private.
Size = Any

# One for each axis of a weight in an equation of `einsum`; the last two stand for the rank.
_LETTERS = string.ascii_lowercase[:-2]

# For each axis of a weight, and after them for the rank: which axis of an array it is, or None.
Places = tuple[int | None, ...]


def positions(axes: Axes, *roles: AxisRole) -> tuple[int, ...]:
    """Returns the axes that have one of `roles`, in the order of the roles."""
    return tuple(axis for role in roles for axis, axis_role in enumerate(axes) if axis_role == role)


def factor_places(axes: Axes) -> tuple[Places, Places]:
    """Returns where lora_A and lora_B hold each axis of the weight, and after them the rank."""
    rank = len(axes)
    A_axes = (*positions(axes, "batch", "in"), rank)
    B_axes = (*positions(axes, "batch"), rank, *positions(axes, "out"))
    return _places(A_axes, axes), _places(B_axes, axes)


def row_places(axes: Axes) -> Places:
    """Returns where the lora_B of single rows holds each axis: the rank's place is the input's."""
    *places, rank = factor_places(axes)[1]
    (row_axis,) = positions(axes, "in")
    places[row_axis] = rank
    return (*places, None)


def magnitude_places(axes: Axes) -> Places:
    """Returns where a magnitude holds each axis of the weight; it does not depend on the rank."""
    return _places(positions(axes, "batch", "out"), axes)


def batch_places(axes: Axes) -> Places:
    """Returns where an array of the batch axes alone holds each axis of the weight."""
    return _places(positions(axes, "batch"), axes)


def aligned(array: Array, places: Places) -> Array:
    """Returns `array` with an axis for each of `places`, of size 1 where it holds none."""
    held = [place for place in places if place is not None]
    absent = [axis for axis, place in enumerate(places) if place is None]
    if held == sorted(held) and not absent:
        return array
    with mesh_of(array):
        in_order = array if held == sorted(held) else array.transpose(held)
        return jnp.expand_dims(in_order, absent) if absent else in_order


def weight_letters(axes: Axes) -> str:
    """Returns the letters of a weight's axes in an equation of `einsum`."""
    return _LETTERS[: len(axes)]


def letters(axes: Axes, *roles: AxisRole) -> str:
    """Returns the letters of the axes that have one of `roles`, in the order of the roles."""
    return "".join(_LETTERS[axis] for axis in positions(axes, *roles))


def factor_letters(axes: Axes) -> tuple[str, str]:
    """Returns the letters of lora_A and lora_B, where the rank is z."""
    batch, inputs, outputs = (letters(axes, role) for role in ("batch", "in", "out"))
    return f"{batch}{inputs}z", f"{batch}z{outputs}"


def side_size(shape: tuple[int, ...], axes: Axes, role: AxisRole) -> int:
    """Returns the product of the sizes of the axes of `shape` that have `role`."""
    return math.prod(sizes(shape, axes, role))


def sizes(shape: tuple[int, ...], axes: Axes, *roles: AxisRole) -> tuple[int, ...]:
    """Returns the sizes of the axes of `shape` that have one of `roles`."""
    return tuple(shape[axis] for axis in positions(axes, *roles))


def largest_rank(shape: tuple[int, ...], axes: Axes) -> int:
    """Returns the largest rank that a change of a weight can have: its smaller side."""
    return min(side_size(shape, axes, role) for role in ("in", "out"))


def factor_shapes(
    shape: tuple[int, ...], axes: Axes, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of `lora_A` and `lora_B` for a weight of this shape."""
    batch, inputs, outputs = (sizes(shape, axes, role) for role in ("batch", "in", "out"))
    return (*batch, *inputs, rank), (*batch, rank, *outputs)


def to_matrices(weight: AnyArray, axes: Axes) -> Array:
    """Returns `weight` as a stack of matrices, of shape (batch, in, out)."""
    sides = [side_size(weight.shape, axes, role) for role in ("batch", "in", "out")]
    return jnp.asarray(weight).transpose(positions(axes, "batch", "in", "out")).reshape(sides)


def layers_shape(shape: tuple[int, ...], axes: Axes, layers: Layers | None) -> tuple[int, ...]:
    """Returns the shape of the part of a weight that `layers` selects."""
    if layers is None:
        return shape
    axis = axes.index("batch")
    return (*shape[:axis], len(layers), *shape[axis + 1 :])


def taken_layers(weight: AnyArray, axes: Axes, layers: Layers | None) -> AnyArray:
    """Returns the part of a weight that `layers` selects."""
    if layers is None:
        return weight
    return weight[_index(axes.index("batch"), layers)]


def with_layers(weight: AnyArray, part: AnyArray, axes: Axes, layers: Layers | None) -> Array:
    """Returns `weight` with `part` in place of what `layers` selects."""
    if layers is None:
        return jnp.asarray(part)
    return jnp.asarray(weight).at[_index(axes.index("batch"), layers)].set(part)


def spread_layers(
    array: Array, axis: int | None, layers: Layers, count: int, elsewhere: int
) -> Array:
    """Returns an array of some layers as one of all `count`, with a number for the others."""
    assert axis is not None
    shape = (*array.shape[:axis], count, *array.shape[axis + 1 :])
    return jnp.full(shape, elsewhere, array.dtype).at[_index(axis, layers)].set(array)


def _index(axis: int, layers: Layers) -> tuple[slice | Array, ...]:
    first, last = layers[0], layers[-1]
    is_range = layers == tuple(range(first, last + 1))
    return (slice(None),) * axis + (slice(first, last + 1) if is_range else jnp.array(layers),)


def _places(held: Sequence[int], axes: Axes) -> Places:
    return tuple(held.index(axis) if axis in held else None for axis in range(len(axes) + 1))
