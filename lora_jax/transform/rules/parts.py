"""Rules for parts of a weight, and for weights that are parts of a larger array.

A term of a part has a window: the range of an axis outside of which it is zero.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax._compat import Equation, Primitive, is_tracer, primitives
from lora_jax._dtypes import common_dtype
from lora_jax._shapes import Size
from lora_jax.transform._bases import moved_bases
from lora_jax.transform._factored import Factored, gain_of, terms_of
from lora_jax.transform._interpreter import Interpreter
from lora_jax.transform._product import sharding_of
from lora_jax.transform._roles import of_weights_alone
from lora_jax.transform._terms import Factor, Range, Rows, Term, Windows, without_windows
from lora_jax.transform.rules._moves import with_base
from lora_jax.transform.rules._rule import Rule


def slice_(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns a range of the weight; the parts of factors outside of it are never touched."""
    (value,) = inputs
    starts = equation.params["start_indices"]
    stops = equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * value.ndim
    cuts = {
        axis: slice(start, stop, stride)
        for axis, (start, stop, stride, size) in enumerate(
            zip(starts, stops, strides, value.shape, strict=True)
        )
        if (start, stop, stride) != (0, size, 1)
    }

    def cut(factor: Factor, axes: Collection[int]) -> Factor:
        array = factor.aligned
        sizes = enumerate(array.shape[:-1])
        indices = [
            cuts[axis] if axis in axes and size != 1 else slice(None) for axis, size in sizes
        ]
        return factor.rearranged(array[tuple(indices)])

    ranges = {
        axis: (each.start, each.stop - each.start) if each.step == 1 else None
        for axis, each in cuts.items()
    }
    return [_part(value, moved_bases(equation, inputs)[0], ranges, cut)]


def _part(
    value: Factored,
    base: Any,
    ranges: Mapping[int, tuple[Any, Size] | None],
    cut: Callable[[Factor, Collection[int]], Factor],
) -> Factored:
    """Returns a part of a weight; of single rows, those that are in it.

    Args:
      value: the weight.
      base: the part of its base.
      ranges: for each axis that is cut, the first place and the number of places; None if they are
        not neighbours.
      cut: cuts a factor on these of the axes.
    """

    def part_of(term: Term) -> Term:
        rows = {
            axis: window.within(*places, value.shape[axis])
            for axis, places in ranges.items()
            if isinstance(window := term.window[axis], Rows) and places is not None
        }
        if any(term.window[axis] is not None for axis in ranges if axis not in rows):
            term, rows = without_windows(term, value.shape), {}
        axes = [axis for axis in ranges if axis not in rows]
        return dataclasses.replace(
            term,
            factor_A=cut(term.factor_A, axes),
            factor_B=cut(term.factor_B, axes),
            window=tuple(rows.get(axis, window) for axis, window in enumerate(term.window)),
        )

    gain = value.gain and cut(value.gain, list(ranges))
    return Factored(base, tuple(map(part_of, value.terms)), gain)


def split(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the parts of the weight along one axis."""
    (value,) = inputs
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    value = value.without_windows([axis])
    bases = moved_bases(equation, inputs)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]

    def part(start: Size, size: Size) -> Callable[[Array], Array]:
        return lambda factor: (
            jax.lax.slice_in_dim(factor, start, start + size, axis=axis)
            if factor.shape[axis] != 1
            else factor
        )

    return [
        with_base(value, base, part(start, size))
        for base, start, size in zip(bases, starts, sizes, strict=True)
    ]


def unstack(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the parts of the weight along one axis, each without it."""
    (value,) = inputs
    axis = equation.params["axis"]
    value = value.without_windows([axis])
    bases = moved_bases(equation, inputs)

    def part(place: int) -> Callable[[Array], Array]:
        return lambda factor: jax.lax.index_in_dim(
            factor, place if factor.shape[axis] != 1 else 0, axis, keepdims=False
        )

    return [
        with_base(value, base, part(place), lambda windows: (*windows[:axis], *windows[axis + 1 :]))
        for place, base in enumerate(bases)
    ]


def dynamic_slice(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> list[Any] | None:
    """Returns a range that starts where the numbers say: a layer picked out of a stack."""
    value, *starts = inputs
    if not isinstance(value, Factored) or len(starts) != value.ndim:
        return None
    sizes = equation.params["slice_sizes"]
    # The model's index is normalised already: a negative one is out of bounds.
    ranges = {
        axis: (starts[axis], size)
        for axis, (size, whole) in enumerate(zip(sizes, value.shape, strict=True))
        if size != whole
    }

    def cut(factor: Factor, axes: Collection[int]) -> Factor:
        array = factor.aligned
        held = [axis for axis in axes if array.shape[axis] != 1]
        for axis in held:
            array = jax.lax.dynamic_slice_in_dim(
                array, starts[axis], sizes[axis], axis=axis, allow_negative_indices=False
            )
        # Each device may start elsewhere, and then holds another part.
        return Factor.of_aligned(array) if held else factor

    return [_part(value, moved_bases(equation, inputs)[0], ranges, cut)]


def concatenate(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns weights joined along an axis: each one's terms fill a window of the whole."""
    axis = int(equation.params["dimension"])
    terms: list[Term] = []
    start = 0
    for value in inputs:
        size = value.shape[axis]
        for term in terms_of(value) if size else ():
            window = (term.window[axis] or Range(0, size)).shifted(start)
            windows = (*term.window[:axis], window, *term.window[axis + 1 :])
            terms.append(dataclasses.replace(term, window=windows))
        start += size
    sizes = [value.shape[axis] for value in inputs]
    gain = _joined_gain([gain_of(value) for value in inputs], axis, sizes)
    return [Factored(moved_bases(equation, inputs)[0], tuple(terms), gain)]


def stack(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns weights stacked along a new axis: each one's terms fill one index of it."""
    axis = equation.params["axis"]
    terms = tuple(
        term.rearranged(
            jnp.expand_dims(term.lora_A, axis),
            jnp.expand_dims(term.lora_B, axis),
            (*term.window[:axis], Range(place, place + 1), *term.window[axis:]),
        )
        for place, value in enumerate(inputs)
        for term in terms_of(value)
    )
    gains = [
        gain and gain.rearranged(jnp.expand_dims(gain.aligned, axis))
        for gain in map(gain_of, inputs)
    ]
    gain = _joined_gain(gains, axis, [1] * len(inputs))
    return [Factored(moved_bases(equation, inputs)[0], terms, gain)]


def pad(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns the weight within a larger array: each term fills a window of it.

    Padding between the elements has no window, so the weight is built there.
    """
    value, padding_value = inputs
    config = equation.params["padding_config"]
    if not isinstance(value, Factored) or isinstance(padding_value, Factored):
        return None
    if any(min(sides) < 0 or sides[2] for sides in config):
        return None
    if value.gain is not None and not _is_zero(padding_value):
        return None

    def widened(windows: Windows) -> Windows:
        return tuple(
            window if lo == hi == 0 else (window or Range(0, size)).shifted(lo)
            for window, (lo, hi, _), size in zip(windows, config, value.shape, strict=True)
        )

    base = moved_bases(equation, inputs)[0]
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


def _joined_gain(gains: Sequence[Factor | None], axis: int, sizes: Sequence[Size]) -> Factor | None:
    """Returns the gain of weights joined along an axis; where a weight has none, it is 1."""
    known = [gain.aligned for gain in gains if gain is not None]
    if not known:
        return None
    dtype = common_dtype(*(array.dtype for array in known))
    shapes = [[size if i != axis else 1 for i, size in enumerate(array.shape)] for array in known]
    common = list(jnp.broadcast_shapes(*shapes))
    sharding = next(filter(None, map(sharding_of, known)), None)
    parts = [
        jnp.broadcast_to(
            jnp.ones((), dtype) if gain is None else gain.aligned.astype(dtype),
            (*common[:axis], size, *common[axis + 1 :]),
        )
        for gain, size in zip(gains, sizes, strict=True)
    ]
    if sharding is not None:
        parts = [jax.sharding.reshard(part, sharding) for part in parts]
    return Factor.of_aligned(jnp.concatenate(parts, axis))


def rules() -> dict[Primitive, Rule]:
    """Returns the rules of ops that cut weights and join them."""
    return {
        jax.lax.split_p: Rule(factors=split),
        jax.lax.stack_p: Rule(factors=stack, roles=of_weights_alone(stack)),
        jax.lax.unstack_p: Rule(factors=unstack),
        primitives.concatenate_p: Rule(factors=concatenate, roles=of_weights_alone(concatenate)),
        primitives.dynamic_slice_p: Rule(factors=dynamic_slice),
        primitives.pad_p: Rule(factors=pad),
        primitives.slice_p: Rule(factors=slice_),
    }
