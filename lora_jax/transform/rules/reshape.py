"""The rule for `reshape`: factors are reshaped too, where they hold whole groups of axes.

A reshape splits the axes of an array into groups, of equal size before and after. A factor that
holds only some of a group's axes would have to grow by the others.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import Equation, Primitive, primitives
from lora_jax._shapes import Size
from lora_jax.transform._bases import moved_bases
from lora_jax.transform._factored import Factored
from lora_jax.transform._interpreter import Interpreter
from lora_jax.transform._terms import without_windows
from lora_jax.transform.rules._moves import moved
from lora_jax.transform.rules._rule import Rule

# Old axes and the new ones that they become.
Group = tuple[list[int], list[int]]


def reshape(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns the weight reshaped, where each factor holds all or none of the axes that join."""
    value = inputs[0]
    if equation.params["dimensions"] is not None or len(inputs) > 1:
        return None
    new_shape = equation.params["new_sizes"]
    groups = reshape_groups(value.shape, new_shape)
    if groups is None:
        return None
    moved_axes = {new[0]: old[0] for old, new in groups if (len(old), len(new)) == (1, 1)}
    # An axis that stays keeps its window; an axis of size 1 may be gone.
    value = value.without_windows(set(range(value.ndim)) - set(moved_axes.values()))
    factors = [factor for term in value.terms for factor in (term.lora_A, term.lora_B)]
    if value.gain is not None:
        factors.append(value.gain.aligned)
    if any(_factor_shape(factor, new_shape, groups) is None for factor in factors):
        return None
    return [
        moved(
            equation,
            value,
            lambda factor: factor.reshape(_factor_shape(factor, new_shape, groups)),
            lambda windows: tuple(
                windows[moved_axes[axis]] if axis in moved_axes else None
                for axis in range(len(new_shape))
            ),
        )
    ]


def roles(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns the weight reshaped, each probe on all of the axes that its axis becomes."""
    value, new_shape = inputs[0], equation.params["new_sizes"]
    groups = reshape_groups(value.shape, new_shape)
    if groups is None:
        return None

    def spread(factor: Array) -> Array:
        held = {
            axis
            for old, new in groups
            for axis in new
            if any(factor.shape[place] != 1 for place in old)
        }
        sizes = [size if axis in held else 1 for axis, size in enumerate(new_shape)]
        return jnp.zeros((*sizes, 1))

    terms = tuple(
        term.moved(spread(term.lora_A), spread(term.lora_B), (None,) * len(new_shape))
        for term in (without_windows(term, value.shape) for term in value.terms)
    )
    return [Factored(moved_bases(equation, inputs)[0], terms)]


def reshape_groups(old_shape: Sequence[Size], new_shape: Sequence[Size]) -> list[Group] | None:
    """Returns the smallest groups of old and new axes of equal size; axes of size 1 are in none.

    None where sizes are symbols whose order is not known.
    """
    try:
        return _groups(old_shape, new_shape)
    except jax.errors.InconclusiveDimensionOperation:
        return None


def _groups(old_shape: Sequence[Size], new_shape: Sequence[Size]) -> list[Group]:
    old = [axis for axis, size in enumerate(old_shape) if size != 1]
    new = [axis for axis, size in enumerate(new_shape) if size != 1]
    groups: list[Group] = []
    while old and new:
        old_group, new_group = [old.pop(0)], [new.pop(0)]
        while (sizes := _group_sizes(old_group, old_shape, new_group, new_shape))[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                old_group.append(old.pop(0))
            else:
                new_group.append(new.pop(0))
        groups.append((old_group, new_group))
    return groups


def _group_sizes(
    old: Sequence[int], old_shape: Sequence[Size], new: Sequence[int], new_shape: Sequence[Size]
) -> tuple[Size, Size]:
    return math.prod(old_shape[axis] for axis in old), math.prod(new_shape[axis] for axis in new)


def _factor_shape(
    factor: Array, new_shape: Sequence[Size], groups: Sequence[Group]
) -> tuple[Size, ...] | None:
    """Returns the shape of a factor after the reshape, or None if it holds a part of a group."""
    sizes = [1] * len(new_shape)
    for old, new in groups:
        holds = [factor.shape[axis] != 1 for axis in old]
        if len(old) == len(new) == 1:
            sizes[new[0]] = factor.shape[old[0]]
        elif all(holds):
            for axis in new:
                sizes[axis] = new_shape[axis]
        elif any(holds):
            return None
    return (*sizes, factor.shape[-1])


def rules() -> dict[Primitive, Rule]:
    """Returns the rule of `reshape`."""
    return {primitives.reshape_p: Rule(factors=reshape, roles=roles)}
