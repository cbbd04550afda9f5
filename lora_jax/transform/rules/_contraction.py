"""What terms of a weight add to a contraction with it: products of its factors and the rest.

Adapted or not, an operand's axes are named by labels, the same ones for axes that are contracted or
mapped over together.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import Equation
from lora_jax._dtypes import common_dtype
from lora_jax._shapes import AnyArray, Size
from lora_jax.transform._bases import array_of
from lora_jax.transform._factored import Factored, terms_of
from lora_jax.transform._interpreter import Interpreter
from lora_jax.transform._product import (
    Labelled,
    Labels,
    Plan,
    plan_product,
    product,
    sharding_of,
    without_unit_axes,
)
from lora_jax.transform._terms import Term, Window, block_shape, without_windows


def labels_of(equation: Equation, inputs: Sequence[Any]) -> tuple[tuple[Labels, Labels], Labels]:
    """Returns the labels of both operands' axes and those of the output, in its order."""
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = equation.params["dimension_numbers"]
    lhs = tuple(range(inputs[0].ndim))
    paired = dict(zip((*rhs_contracted, *rhs_batch), (*lhs_contracted, *lhs_batch), strict=True))
    rhs = tuple(paired.get(axis, len(lhs) + axis) for axis in range(inputs[1].ndim))
    lhs_free = [axis for axis in lhs if axis not in (*lhs_contracted, *lhs_batch)]
    rhs_free = [label for label in rhs if label >= len(lhs)]
    return (lhs, rhs), (*lhs_batch, *lhs_free, *rhs_free)


def rank_label_of(position: int, labels: Sequence[Labels]) -> int:
    """Returns a label for a factor's rank that no axis of any operand has."""
    return 1 + position + max((label for named in labels for label in named), default=0)


def plans_of(
    position: int, inputs: Sequence[Any], labels: Sequence[Labels], output: Labels
) -> list[Plan]:
    """Returns, for each term of an operand, how to multiply it with the other operand's base."""
    return [
        _plan(term, inputs[position].shape, position, inputs, labels, output)
        for term in terms_of(inputs[position])
    ]


def _plan(
    term: Term,
    shape: tuple[Size, ...],
    position: int,
    inputs: Sequence[Any],
    labels: Sequence[Labels],
    output: Labels,
) -> Plan:
    block = dict(zip(labels[position], block_shape(term, shape), strict=True))
    rank_label = rank_label_of(position, labels)
    size_of = {**sizes_of(inputs, labels), **block, rank_label: term.rank}
    operands: list[Labels] = []
    for own, named in enumerate(labels):
        if own != position:
            operands.append(tuple(label for label in named if size_of[label] != 1))
            continue
        for factor in (term.lora_A, term.lora_B):
            pairs = zip((*named, rank_label), factor.shape, strict=True)
            operands.append(tuple(label for label, size in pairs if size != 1))
    return plan_product(operands, output, size_of)


def changing(
    interpreter: Interpreter,
    equation: Equation,
    use: int,
    operands: Sequence[Any],
    summand: Sequence[tuple[Term, Plan] | None],
    *context: Any,
) -> tuple[Any, ...]:
    """Returns `change_by` as a function of the operands that stand for themselves, and those."""
    places = [place for place, part in enumerate(summand) if part is None]

    def change(*own: Any) -> Array:
        by_place = dict(zip(places, own, strict=True))
        mixed = [by_place.get(place, operand) for place, operand in enumerate(operands)]
        return change_by(interpreter, equation, use, mixed, summand, *context)

    return change, *(operands[place] for place in places)


def change_by(
    interpreter: Interpreter,
    equation: Equation,
    use: int,
    operands: Sequence[Any],
    summand: Sequence[tuple[Term, Plan] | None],
    labels: Sequence[Labels],
    output: Labels,
    result: Array,
) -> Array:
    """Returns one summand of the product, in the shape and dtype of `result`.

    Args:
      interpreter: at the equation.
      equation: the contraction.
      use: tells apart the masks of the summands.
      operands: the operands as they are computed with.
      summand: for each operand the term that stands for it, with its plan, or None for the base.
      labels: the labels of each operand.
      output: the labels of the result.
      result: the product of the bases.
    """
    terms = [None if part is None else part[0] for part in summand]
    plans = [part[1] for part in summand if part is not None]
    if len(plans) > 1:
        terms = [
            None if term is None else without_windows(term, operand.shape)
            for term, operand in zip(terms, operands, strict=True)
        ]
    ranges = _ranges(terms, labels)
    arrays: list[tuple[Array, Labels]] = []
    for position, (operand, term) in enumerate(zip(operands, terms, strict=True)):
        if term is None:
            array = _sliced(array_of(operand), labels[position], ranges)
            if not isinstance(operand, Factored):
                array = interpreter.dropout.dropped_out(array, use)
            arrays.append((array, labels[position]))
        else:
            named = (*labels[position], rank_label_of(position, labels))
            arrays += [(term.lora_A, named), (term.lora_B, named)]
    dtype = common_dtype(*(array.dtype for array, _ in arrays))
    scales = [term.scale for term in terms if term is not None]
    if any(not isinstance(operand, Factored) for operand in operands):
        scales[0] = interpreter.dropout.scaled(scales[0])
    count = _constant_count(operands, labels, output, ranges, arrays)
    if count != 1:
        scales.append(jnp.asarray(count, scales[0].dtype))
    joined = product(
        [without_unit_axes(array.astype(dtype), named) for array, named in arrays],
        output,
        plan=plans[0] if len(plans) == 1 else None,
        scale=math.prod(scales[1:], start=scales[0]),
        precision=equation.params["precision"],
        preferred_element_type=product_dtype(equation, dtype),
        sharding=sharding_of(result),
    )
    return _placed(joined, output, ranges, result)


def _constant_count(
    operands: Sequence[Any],
    labels: Sequence[Labels],
    output: Labels,
    ranges: Mapping[int, Window],
    arrays: Sequence[tuple[Array, Labels]],
) -> int:
    """Returns how many equal products a summand sums, along axes that none of its arrays has.

    A factor has size 1 on an axis that it does not depend on. Where both weights were broadcast
    along an axis that the product sums over, no array tells its size.
    """
    size_of = {
        **sizes_of(operands, labels),
        **{label: stop - start for label, (start, stop) in ranges.items()},
    }
    held = {
        label
        for array, named in arrays
        for label, size in zip(named, array.shape, strict=True)
        if size != 1
    }
    return math.prod(
        size for label, size in size_of.items() if label not in held and label not in output
    )


def _placed(joined: Labelled, output: Labels, ranges: dict[int, Window], result: Array) -> Array:
    """Returns a product broadcast and padded to the shape of `result`, and cast to its dtype."""
    absent = [axis for axis, label in enumerate(output) if label not in joined.labels]
    array = jnp.expand_dims(joined.array, absent).astype(result.dtype)
    windows = [
        ranges.get(label, (0, size)) for label, size in zip(output, result.shape, strict=True)
    ]
    array = jnp.broadcast_to(array, [stop - start for start, stop in windows])
    if array.shape == result.shape:
        return array
    padding = [(lo, size - hi) for (lo, hi), size in zip(windows, result.shape, strict=True)]
    return jnp.pad(array, padding)


def product_dtype(equation: Equation, dtype: Any) -> Any:
    """Returns the dtype in which products accumulate: the model's, or the factors' if wider."""
    wanted = equation.params["preferred_element_type"]
    return dtype if wanted is None else common_dtype(dtype, wanted)


def _sliced(array: AnyArray, labels: Labels, ranges: dict[int, Window]) -> Array:
    for axis, label in enumerate(labels):
        if label in ranges:
            array = jax.lax.slice_in_dim(array, *ranges[label], axis=axis)
    return jnp.asarray(array)


def _ranges(terms: Sequence[Term | None], labels: Sequence[Labels]) -> dict[int, Window]:
    """Returns, for each label that a term's window restricts, the range that it allows."""
    return {
        label: window
        for term, named in zip(terms, labels, strict=True)
        if term is not None
        for label, window in zip(named, term.window, strict=True)
        if window is not None
    }


def sizes_of(inputs: Sequence[Any], labels: Sequence[Labels]) -> dict[int, Size]:
    return {
        label: size
        for value, named in zip(inputs, labels, strict=True)
        for label, size in zip(named, value.shape, strict=True)
    }
