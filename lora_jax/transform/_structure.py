"""Rules for ops that only move, cut or scale a weight: done to the base, they are done to factors.

A factor has size 1 on the axes that it doesn't depend on. So a rule does to a factor what the op
does to the base on the other axes, and leaves the axes of size 1 and the rank alone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import Equation, evaluate_equation
from lora_jax._shapes import Size
from lora_jax.transform._factored import (
    Factored,
    Window,
    base_of,
)
from lora_jax.transform._interpreter import Interpreter, Rule

Windows = tuple[Window | None, ...]


def on_every_array(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with an op that acts on each element alone and keeps sums done to all.

    `stop_gradient`, copies: f(W + AB) = f(W) + f(A) f(B).
    """
    (value,) = inputs
    return [
        moved(equation, value, lambda factor: equation.primitive.bind(factor, **equation.params))
    ]


def on_base_alone(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with an op that changes no number done to its base, such as a name."""
    (value,) = inputs
    return [dataclasses.replace(value, base=evaluate_equation(equation, [value.base])[0])]


def optimization_barrier(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> list[Any]:
    """Returns the inputs, factors included, behind one barrier."""
    return list(jax.lax.optimization_barrier(tuple(inputs)))


def convert_element_type(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> list[Any] | None:
    """Returns the weight in another floating-point dtype: base and factors are converted alike."""
    (value,) = inputs
    dtype = equation.params["new_dtype"]
    # In 8 bits or fewer a sum of factors would be another number than the sum that is rounded.
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize < 2:
        return None
    converted = moved(equation, value, lambda factor: factor.astype(dtype))
    # A gain near 1 would lose in bfloat16 what it learned; it is cast with the result.
    return [dataclasses.replace(converted, gain=value.gain)]


def transpose(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with its axes in another order."""
    (value,) = inputs
    order = equation.params["permutation"]
    return [
        moved(
            equation,
            value,
            lambda factor: factor.transpose(*order, len(order)),
            lambda windows: tuple(windows[axis] for axis in order),
        )
    ]


def squeeze(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight without some axes of size 1."""
    (value,) = inputs
    removed = equation.params["dimensions"]
    kept = [axis for axis in range(value.ndim) if axis not in removed]
    value = value.without_windows(removed)
    return [
        moved(
            equation,
            value,
            lambda factor: factor.squeeze(removed),
            lambda windows: tuple(windows[axis] for axis in kept),
        )
    ]


def broadcast_in_dim(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with new axes, on which neither factor depends.

    Nor do they depend on an axis of size 1 that grows, and so a term has no window there.
    """
    value = inputs[0]
    shape = equation.params["shape"]
    ndim = len(shape)
    kept = equation.params["broadcast_dimensions"]
    grown = [i for i, axis in enumerate(kept) if value.shape[i] != shape[axis]]
    value = value.without_windows(grown)

    def factor_with_axes(factor: Array) -> Array:
        return jnp.expand_dims(factor, [axis for axis in range(ndim) if axis not in kept])

    def windows_with_axes(windows: Windows) -> Windows:
        by_axis = dict(zip(kept, windows, strict=True))
        return tuple(by_axis.get(axis) for axis in range(ndim))

    base = evaluate_equation(equation, [value.base, *inputs[1:]])[0]
    return [with_base(value, base, factor_with_axes, windows_with_axes)]


def reshape(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns the weight reshaped, where each factor holds all or none of the axes that join.

    A reshape splits the axes into groups, of equal size before and after. A factor that holds only
    some of a group's axes would have to grow by the others.
    """
    value = inputs[0]
    if equation.params["dimensions"] is not None or len(inputs) > 1:
        return None
    new_shape = equation.params["new_sizes"]
    groups = reshape_groups(value.shape, new_shape)
    if groups is None:
        return None
    moved_axes = {new[0]: old[0] for old, new in groups if (len(old), len(new)) == (1, 1)}
    # A window goes along with an axis that stays itself; an axis of size 1 may be gone.
    value = value.without_windows(set(range(value.ndim)) - set(moved_axes.values()))
    factors = [factor for term in value.terms for factor in (term.lora_A, term.lora_B)]
    if value.gain is not None:
        factors.append(value.gain.aligned)
    if any(_reshaped_factor_shape(factor, new_shape, groups) is None for factor in factors):
        return None
    return [
        moved(
            equation,
            value,
            lambda factor: factor.reshape(_reshaped_factor_shape(factor, new_shape, groups)),
            lambda windows: tuple(
                windows[moved_axes[axis]] if axis in moved_axes else None
                for axis in range(len(new_shape))
            ),
        )
    ]


def rev(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with some axes reversed."""
    (value,) = inputs
    reversed_axes = equation.params["dimensions"]

    def mirrored(windows: Windows) -> Windows:
        return tuple(
            (value.shape[axis] - window[1], value.shape[axis] - window[0])
            if window is not None and axis in reversed_axes
            else window
            for axis, window in enumerate(windows)
        )

    return [moved(equation, value, lambda factor: jax.lax.rev(factor, reversed_axes), mirrored)]


def tile(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight repeated along its axes; what a factor does not hold stays as it is."""
    (value,) = inputs
    reps = equation.params["reps"]
    value = value.without_windows([axis for axis, rep in enumerate(reps) if rep != 1])

    def repeated(factor: Array) -> Array:
        held = zip(reps, factor.shape, strict=False)
        return jnp.tile(factor, (*(rep if size != 1 else 1 for rep, size in held), 1))

    return [moved(equation, value, repeated)]


def moved(
    equation: Equation,
    value: Factored,
    factor_moved: Callable[[Array], Array],
    windows_moved: Callable[[Windows], Windows] = lambda windows: windows,
) -> Factored:
    """Returns the value with the equation done to its base, and its counterpart to the factors."""
    return with_base(
        value, evaluate_equation(equation, [value.base])[0], factor_moved, windows_moved
    )


def with_base(
    value: Factored,
    base: Array,
    factor_moved: Callable[[Array], Array],
    windows_moved: Callable[[Windows], Windows] = lambda windows: windows,
) -> Factored:
    terms = tuple(
        term.rearranged(
            factor_moved(term.lora_A), factor_moved(term.lora_B), windows_moved(term.window)
        )
        for term in value.terms
    )
    gain = value.gain and value.gain.rearranged(factor_moved(value.gain.aligned))
    return Factored(base, terms, gain)


def on_bases(equation: Equation, inputs: Sequence[Any]) -> Array:
    bases = [base_of(value) for value in inputs]
    return evaluate_equation(equation, bases)[0]


def reshape_groups(
    old_shape: Sequence[Size], new_shape: Sequence[Size]
) -> list[tuple[list[int], list[int]]] | None:
    """Returns the smallest groups of old and new axes of equal size; axes of size 1 are in none.

    None where sizes are symbols of which it is not known which is larger.
    """
    try:
        return _groups(old_shape, new_shape)
    except jax.errors.InconclusiveDimensionOperation:
        return None


def _groups(
    old_shape: Sequence[Size], new_shape: Sequence[Size]
) -> list[tuple[list[int], list[int]]]:
    old = [axis for axis, size in enumerate(old_shape) if size != 1]
    new = [axis for axis, size in enumerate(new_shape) if size != 1]
    groups: list[tuple[list[int], list[int]]] = []
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


def _reshaped_factor_shape(
    factor: Array, new_shape: Sequence[Size], groups: Sequence[tuple[list[int], list[int]]]
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


RULES: dict[str, Rule] = {
    "broadcast_in_dim": broadcast_in_dim,
    "convert_element_type": convert_element_type,
    "copy": on_every_array,
    "layout_constraint": on_base_alone,
    "name": on_base_alone,
    "optimization_barrier": optimization_barrier,
    "pvary": on_base_alone,
    "reshape": reshape,
    "rev": rev,
    "squeeze": squeeze,
    "stop_gradient": on_every_array,
    "tile": tile,
    "transpose": transpose,
}
