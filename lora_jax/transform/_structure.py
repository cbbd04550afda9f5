"""Rules for ops that only move, cut or scale a weight: done to the base, they are done to factors.

A factor has size 1 on the axes that it doesn't depend on. So a rule does to a factor what the op
does to the base on the other axes, and leaves the axes of size 1 and the rank alone.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax._compat import Equation, evaluate_equation, is_tracer
from lora_jax._dtypes import common_dtype
from lora_jax.transform._factored import (
    Factor,
    Factored,
    Term,
    Window,
    base_of,
    gain_of,
    terms_of,
    without_windows,
)
from lora_jax.transform._interpreter import Interpreter, Rule
from lora_jax.transform._placement import placed

Windows = tuple[Window | None, ...]


def on_every_array(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with an op that acts on each element alone and keeps sums done to all.

    `stop_gradient`, copies: f(W + AB) = f(W) + f(A) f(B).
    """
    (value,) = inputs
    return [
        _moved(equation, value, lambda factor: equation.primitive.bind(factor, **equation.params))
    ]


def on_base_alone(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with an op that changes no number done to its base, such as a name."""
    (value,) = inputs
    return [dataclasses.replace(value, base=evaluate_equation(equation, [value.base])[0])]


def device_put(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns each value on its device or in its memory, the factors of a weight beside it."""
    bases = evaluate_equation(equation, [base_of(value) for value in inputs])
    return [
        placed(value, base, where, _put) if isinstance(value, Factored) else base
        for value, base, where in zip(inputs, bases, equation.params["devices"], strict=True)
    ]


def _put(array: Array, where: Any) -> Array:
    return jax.device_put(array, where)


def sharding_constraint(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> list[Any]:
    """Returns the weight cut as the model says, its factors alike."""
    (value,) = inputs
    base = evaluate_equation(equation, [value.base])[0]
    return [placed(value, base, equation.params["sharding"], jax.lax.with_sharding_constraint)]


def reshard(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight cut over explicit axes as the model says, its factors alike."""
    (value,) = inputs
    base = evaluate_equation(equation, [value.base])[0]
    return [placed(value, base, equation.params["dst_sharding"], jax.sharding.reshard)]


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
    converted = _moved(equation, value, lambda factor: factor.astype(dtype))
    # A gain near 1 would lose in bfloat16 what it learned; it is cast with the result.
    return [dataclasses.replace(converted, gain=value.gain)]


def transpose(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with its axes in another order."""
    (value,) = inputs
    order = equation.params["permutation"]
    return [
        _moved(
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
    value = _without_windows_on(value, [axis in removed for axis in range(value.ndim)])
    return [
        _moved(
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
    value = _without_windows_on(
        value, [size != shape[axis] for size, axis in zip(value.shape, kept, strict=True)]
    )

    def factor_with_axes(factor: Array) -> Array:
        return jnp.expand_dims(factor, [axis for axis in range(ndim) if axis not in kept])

    def windows_with_axes(windows: Windows) -> Windows:
        by_axis = dict(zip(kept, windows, strict=True))
        return tuple(by_axis.get(axis) for axis in range(ndim))

    base = evaluate_equation(equation, [value.base, *inputs[1:]])[0]
    return [_with(value, base, factor_with_axes, windows_with_axes)]


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
    moved_axes = {new[0]: old[0] for old, new in groups if (len(old), len(new)) == (1, 1)}
    # A window goes along with an axis that stays itself; an axis of size 1 may be gone.
    stays = set(moved_axes.values())
    value = _without_windows_on(value, [axis not in stays for axis in range(value.ndim)])
    factors = [factor for term in value.terms for factor in (term.lora_A, term.lora_B)]
    if value.gain is not None:
        factors.append(value.gain.aligned)
    if any(_reshaped_factor_shape(factor, new_shape, groups) is None for factor in factors):
        return None
    return [
        _moved(
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

    return [_moved(equation, value, lambda factor: jax.lax.rev(factor, reversed_axes), mirrored)]


def slice_(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns a range of the weight; what of a factor lies outside of it is never touched."""
    (value,) = inputs
    starts = equation.params["start_indices"]
    stops = equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * value.ndim
    is_cut = [
        (start, stop, stride) != (0, size, 1)
        for start, stop, stride, size in zip(starts, stops, strides, value.shape, strict=True)
    ]
    value = _without_windows_on(value, is_cut)

    def cut(factor: Array) -> Array:
        indices = [
            slice(start, stop, stride) if cut_here and size != 1 else slice(None)
            for start, stop, stride, cut_here, size in zip(
                starts, stops, strides, is_cut, factor.shape[:-1], strict=True
            )
        ]
        return factor[tuple(indices)]

    return [_moved(equation, value, cut)]


def split(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the parts of the weight along one axis."""
    (value,) = inputs
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    value = _without_windows_on(value, [index == axis for index in range(value.ndim)])
    bases = evaluate_equation(equation, [value.base])
    starts = [sum(sizes[:index]) for index in range(len(sizes))]

    def part(start: int, size: int) -> Callable[[Array], Array]:
        return lambda factor: (
            jax.lax.slice_in_dim(factor, start, start + size, axis=axis)
            if factor.shape[axis] != 1
            else factor
        )

    return [
        _with(value, base, part(start, size))
        for base, start, size in zip(bases, starts, sizes, strict=True)
    ]


def unstack(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the parts of the weight along one axis, each without it."""
    (value,) = inputs
    axis = equation.params["axis"]
    value = _without_windows_on(value, [index == axis for index in range(value.ndim)])
    bases = evaluate_equation(equation, [value.base])

    def part(place: int) -> Callable[[Array], Array]:
        return lambda factor: jax.lax.index_in_dim(
            factor, place if factor.shape[axis] != 1 else 0, axis, keepdims=False
        )

    return [
        _with(value, base, part(place), lambda windows: (*windows[:axis], *windows[axis + 1 :]))
        for place, base in enumerate(bases)
    ]


def tile(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight repeated along its axes; what a factor does not hold stays as it is."""
    (value,) = inputs
    reps = equation.params["reps"]
    value = _without_windows_on(value, [rep != 1 for rep in reps])

    def repeated(factor: Array) -> Array:
        held = zip(reps, factor.shape, strict=False)
        return jnp.tile(factor, (*(rep if size != 1 else 1 for rep, size in held), 1))

    return [_moved(equation, value, repeated)]


def pad(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns the weight within a larger array: each term fills a window of it.

    Between the elements of the weight there is no window; there it is built.
    """
    value, padding_value = inputs
    config = equation.params["padding_config"]
    if not isinstance(value, Factored) or any(min(sides) < 0 or sides[2] for sides in config):
        return None
    if value.gain is not None and not _is_zero(padding_value):
        return None

    def widened(windows: Windows) -> Windows:
        return tuple(
            window
            if lo == hi == 0
            else (lo + (window or (0, size))[0], lo + (window or (0, size))[1])
            for window, (lo, hi, _), size in zip(windows, config, value.shape, strict=True)
        )

    base = evaluate_equation(equation, [value.base, padding_value])[0]
    terms = tuple(dataclasses.replace(term, window=widened(term.window)) for term in value.terms)
    if value.gain is None:
        return [Factored(base, terms)]
    gain = value.gain.aligned
    held = [
        sides if size != 1 else (0, 0, 0) for sides, size in zip(config, gain.shape, strict=False)
    ]
    padded = jax.lax.pad(gain, jnp.ones((), gain.dtype), (*held, (0, 0, 0)))
    return [Factored(base, terms, value.gain.rearranged(padded))]


def _is_zero(value: Any) -> bool:
    return not is_tracer(value) and not np.any(np.asarray(value))


def dynamic_slice(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> list[Any] | None:
    """Returns a range that starts where the numbers say: a layer picked out of a stack."""
    value, *starts = inputs
    if not isinstance(value, Factored) or len(starts) != value.ndim:
        return None
    sizes = equation.params["slice_sizes"]
    is_cut = [size != whole for size, whole in zip(sizes, value.shape, strict=True)]
    value = _without_windows_on(value, is_cut)

    def cut(factor: Array) -> Array:
        for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            if is_cut[axis] and factor.shape[axis] != 1:
                # The model's index is normalised already: what is negative still is out of bounds.
                factor = jax.lax.dynamic_slice_in_dim(
                    factor, start, size, axis=axis, allow_negative_indices=False
                )
        return factor

    base = evaluate_equation(equation, [value.base, *starts])[0]
    # Each device may start elsewhere.
    return [_with(value, base, cut).map_factors(lambda factor: Factor.of_aligned(factor.aligned))]


def concatenate(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns weights joined along an axis: each one's terms fill a window of the whole."""
    axis = equation.params["dimension"]
    terms: list[Term] = []
    start = 0
    for value in inputs:
        size = value.shape[axis]
        for term in terms_of(value) if size else ():
            inner = term.window[axis] or (0, size)
            window = (start + inner[0], start + inner[1])
            windows = (*term.window[:axis], window, *term.window[axis + 1 :])
            terms.append(dataclasses.replace(term, window=windows))
        start += size
    sizes = [value.shape[axis] for value in inputs]
    gain = _joined_gain([gain_of(value) for value in inputs], axis, sizes)
    return [Factored(_on_bases(equation, inputs), tuple(terms), gain)]


def stack(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns weights stacked along a new axis: each one's terms fill one place of it."""
    axis = equation.params["axis"]
    terms = tuple(
        term.rearranged(
            jnp.expand_dims(term.lora_A, axis),
            jnp.expand_dims(term.lora_B, axis),
            (*term.window[:axis], (place, place + 1), *term.window[axis:]),
        )
        for place, value in enumerate(inputs)
        for term in terms_of(value)
    )
    gains = [
        gain and gain.rearranged(jnp.expand_dims(gain.aligned, axis))
        for gain in map(gain_of, inputs)
    ]
    gain = _joined_gain(gains, axis, [1] * len(inputs))
    return [Factored(_on_bases(equation, inputs), terms, gain)]


def _joined_gain(gains: Sequence[Factor | None], axis: int, sizes: Sequence[int]) -> Factor | None:
    """Returns the gain of weights joined along an axis; where a weight has none, it is 1."""
    known = [gain.aligned for gain in gains if gain is not None]
    if not known:
        return None
    dtype = common_dtype(*(array.dtype for array in known))
    shapes = [[size if i != axis else 1 for i, size in enumerate(array.shape)] for array in known]
    common = list(jnp.broadcast_shapes(*shapes))
    parts = [
        jnp.broadcast_to(
            jnp.ones((), dtype) if gain is None else gain.aligned.astype(dtype),
            (*common[:axis], size, *common[axis + 1 :]),
        )
        for gain, size in zip(gains, sizes, strict=True)
    ]
    return Factor.of_aligned(jnp.concatenate(parts, axis))


def neg(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the negated weight: base and scale change sign."""
    (value,) = inputs
    terms = tuple(dataclasses.replace(term, scale=-term.scale) for term in value.terms)
    return [Factored(_on_bases(equation, inputs), terms, value.gain)]


def mul(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns the weight times a scalar, or times an array on axes that one factor holds."""
    if all(isinstance(value, Factored) for value in inputs):
        return None
    value, other = inputs if isinstance(inputs[0], Factored) else reversed(inputs)
    return _rescaled(equation, inputs, value, jnp.asarray(other), jnp.multiply)


def div(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns the weight divided by a scalar, or by an array on axes that one factor holds."""
    value, other = inputs
    if not isinstance(value, Factored) or isinstance(other, Factored):
        return None
    return _rescaled(equation, inputs, value, jnp.asarray(other), jnp.divide)


def add(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns a weight plus an array, or the sum of two weights: bases add, terms are listed."""
    if any(gain_of(value) is not None for value in inputs):
        return None
    base = _on_bases(equation, inputs)
    return [Factored(base, tuple(term for value in inputs for term in _terms_on(value, base.ndim)))]


def sub(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns the difference of a weight and an array or another weight."""
    if any(gain_of(value) is not None for value in inputs):
        return None
    base = _on_bases(equation, inputs)
    first, second = (_terms_on(value, base.ndim) for value in inputs)
    negated = tuple(dataclasses.replace(term, scale=-term.scale) for term in second)
    return [Factored(base, first + negated)]


def _terms_on(value: Any, ndim: int) -> tuple[Term, ...]:
    """Returns the terms of a value of `ndim` axes, or of a scalar, as terms of `ndim` axes."""
    terms = terms_of(value)
    if jnp.ndim(base_of(value)) == ndim:
        return terms
    ones = (1,) * ndim
    return tuple(
        term.rearranged(
            term.lora_A.reshape(*ones, -1), term.lora_B.reshape(*ones, -1), (None,) * ndim
        )
        for term in terms
    )


def _moved(
    equation: Equation,
    value: Factored,
    factor_moved: Callable[[Array], Array],
    windows_moved: Callable[[Windows], Windows] = lambda windows: windows,
) -> Factored:
    """Returns the value with the equation done to its base, and its counterpart to the factors."""
    return _with(value, evaluate_equation(equation, [value.base])[0], factor_moved, windows_moved)


def _with(
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


def _without_windows_on(value: Factored, axes: Sequence[bool]) -> Factored:
    """Returns the value with no term that has a window on one of these axes."""
    terms = tuple(
        without_windows(term, value.shape)
        if any(cut and window is not None for cut, window in zip(axes, term.window, strict=True))
        else term
        for term in value.terms
    )
    return dataclasses.replace(value, terms=terms)


def _rescaled(
    equation: Equation,
    inputs: Sequence[Any],
    value: Factored,
    other: Array,
    operation: Callable[[Array, Array], Array],
) -> list[Any] | None:
    """Returns the value times or over an array that each term absorbs, into scale or one factor."""
    if value.ndim < other.ndim:  # one number of a weight, times an array
        return None
    terms = [_rescaled_term(term, value.shape, other, operation) for term in value.terms]
    absorbed = tuple(term for term in terms if term is not None)
    if len(absorbed) < len(terms):
        return None
    return [Factored(_on_bases(equation, inputs), absorbed, value.gain)]


def _rescaled_term(
    term: Term,
    shape: tuple[int, ...],
    other: Array,
    operation: Callable[[Array, Array], Array],
) -> Term | None:
    if other.ndim == 0:
        scale = operation(term.scale, other.astype(term.scale.dtype))
        alike = frozenset[str]() if is_tracer(other) else term.scale_alike_over
        return dataclasses.replace(term, scale=scale, scale_alike_over=alike)
    term = without_windows(term, shape)
    held = {axis for axis, size in enumerate(other.shape) if size != 1}

    def absorbed(factor: Array) -> Array:
        return operation(factor, other[..., None].astype(factor.dtype))

    if _holds(term.lora_A, held):
        return term.moved(absorbed(term.lora_A), term.lora_B)
    if _holds(term.lora_B, held):
        return term.moved(term.lora_A, absorbed(term.lora_B))
    return None


def _holds(factor: Array, axes: Collection[int]) -> bool:
    return all(factor.shape[axis] != 1 for axis in axes)


def _on_bases(equation: Equation, inputs: Sequence[Any]) -> Array:
    bases = [base_of(value) for value in inputs]
    return evaluate_equation(equation, bases)[0]


def reshape_groups(
    old_shape: Sequence[int], new_shape: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Returns the smallest groups of old and new axes of equal size; axes of size 1 are in none."""
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
    old: Sequence[int], old_shape: Sequence[int], new: Sequence[int], new_shape: Sequence[int]
) -> tuple[int, int]:
    return math.prod(old_shape[axis] for axis in old), math.prod(new_shape[axis] for axis in new)


def _reshaped_factor_shape(
    factor: Array, new_shape: Sequence[int], groups: Sequence[tuple[list[int], list[int]]]
) -> tuple[int, ...] | None:
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
    "add": add,
    "add_any": add,
    "broadcast_in_dim": broadcast_in_dim,
    "concatenate": concatenate,
    "convert_element_type": convert_element_type,
    "copy": on_every_array,
    "device_put": device_put,
    "div": div,
    "dynamic_slice": dynamic_slice,
    "mul": mul,
    "name": on_base_alone,
    "neg": neg,
    "optimization_barrier": optimization_barrier,
    "pad": pad,
    "reshape": reshape,
    "pvary": on_base_alone,
    "rev": rev,
    "reshard": reshard,
    "sharding_constraint": sharding_constraint,
    "slice": slice_,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "stop_gradient": on_every_array,
    "sub": sub,
    "tile": tile,
    "transpose": transpose,
    "unstack": unstack,
}
