"""The rule for `dot_general`: the base op plus the products of the other operand and the factors.

Adapted or not, an operand's axes are named by labels, the same ones for axes that are contracted or
mapped over together.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import Equation, Primitive, primitives
from lora_jax._dtypes import common_dtype
from lora_jax._shapes import AnyArray, Size
from lora_jax.transform._bases import array_of, computed_with_bases, rematerialized
from lora_jax.transform._building import chosen, materialized_inputs
from lora_jax.transform._factored import Factored, multiplied, terms_of
from lora_jax.transform._interpreter import Interpreter, scope_of
from lora_jax.transform._product import (
    Labelled,
    Labels,
    Plan,
    plan_product,
    product,
    sharding_of,
    without_unit_axes,
)
from lora_jax.transform._roles import contraction_roles, note_roles
from lora_jax.transform._rows import recorded
from lora_jax.transform._terms import Term, Window, block_shape, without_windows
from lora_jax.transform.rules._rule import Rule


def dot_general(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> Sequence[Any] | None:
    r"""Returns $x \cdot W$ plus, for each term, the product of x, lora_A and lora_B.

    A contraction is linear in each operand, so with $W = W_0 + \sum_k s_k A_k B_k$ it is the base
    contraction plus one of three operands for each term, which is taken in the cheapest order. If
    both operands are factored, the sum is multiplied out.
    """
    labels, output = labels_of(equation, inputs)
    inputs, gains = _with_gains_outside(interpreter, equation, inputs, labels, output)
    plans = [_plans(position, inputs, labels, output) for position in range(len(inputs))]
    choices = [
        _chosen(interpreter, equation, position, inputs, labels, plans[position])
        for position in range(len(inputs))
    ]
    result = computed_with_bases(equation, choices)[0]
    parts: list[Any] = [
        # A weight that was built has no terms left.
        [None, *zip(terms_of(choice), of_terms, strict=False)]
        for choice, of_terms in zip(choices, plans, strict=True)
    ]
    with scope_of(equation), jax.named_scope("lora"):
        for use, summand in enumerate(itertools.product(*parts)):
            if any(part is not None for part in summand):
                changed = _changing(
                    interpreter, equation, use, choices, summand, labels, output, result
                )
                result += rematerialized(*changed)
        for gain in gains:
            result = multiplied(result, gain).astype(result.dtype)
    return [result]


def roles(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Records which axes are contracted (inputs), mapped over (batch) and kept (outputs)."""
    contracted, batch = equation.params["dimension_numbers"]
    for position, value in enumerate(inputs):
        if isinstance(value, Factored):
            own = contraction_roles(
                value.ndim, contracted=contracted[position], batch=batch[position]
            )
            note_roles(interpreter, equation, value, own)
    return computed_with_bases(equation, inputs)


def rows(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the product with the base, the rows of the other operand recorded."""
    labels, output = labels_of(equation, inputs)
    result = computed_with_bases(equation, inputs)[0]
    for position, value in enumerate(inputs):
        other = inputs[1 - position]
        if isinstance(value, Factored) and not isinstance(other, Factored):
            for term in value.terms:
                result = _with_rows(
                    result,
                    other,
                    labels[1 - position],
                    without_windows(term, value.shape),
                    labels[position],
                    output,
                )
    return [result]


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


def _with_gains_outside(
    interpreter: Interpreter,
    equation: Equation,
    inputs: Sequence[Any],
    labels: Sequence[Labels],
    output: Labels,
) -> tuple[list[Any], list[Array]]:
    r"""Returns the operands without gains, and the factor to multiply the product by instead.

    A gain g on axes that the product keeps moves to the result: $x (W \circ g) = (x W) \circ g$. On
    axes that it sums over, g moves to the other operand: $(W \circ g) x = W (g \circ x)$. If it is
    on axes of both kinds, or if the other operand is a weight too, the weight is built.
    """
    operands = list(inputs)
    gains: list[Array] = []
    for position, value in enumerate(inputs):
        if not isinstance(value, Factored) or value.gain is None:
            continue
        kept = {axis for axis, label in enumerate(labels[position]) if label in output}
        other = operands[1 - position]
        without_gain = dataclasses.replace(value, gain=None)
        gain = value.gain.aligned.squeeze(-1)
        if value.held_by_gain <= kept:
            operands[position] = without_gain
            gains.append(_in_axes_of(output, gain, labels[position]))
        elif not value.held_by_gain & kept and not isinstance(other, Factored):
            with scope_of(equation), jax.named_scope("lora"):
                scaled = multiplied(
                    other, _in_axes_of(labels[1 - position], gain, labels[position])
                )
                operands[1 - position] = scaled.astype(other.dtype)
            operands[position] = without_gain
        else:
            operands[position] = materialized_inputs(interpreter.reporter, equation, [value])[0]
    return operands, gains


def _in_axes_of(target: Labels, array: Array, labels: Labels) -> Array:
    """Returns an array that is the same everywhere but on axes of `target`, with those axes."""
    held = without_unit_axes(array, labels)
    order = [label for label in target if label in held.labels]
    in_order = held.array.transpose([held.labels.index(label) for label in order])
    return jnp.expand_dims(
        in_order, [axis for axis, label in enumerate(target) if label not in order]
    )


def _plans(
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
    size_of = {**_sizes(inputs, labels), **block, rank_label: term.rank}
    operands: list[Labels] = []
    for own, named in enumerate(labels):
        if own != position:
            operands.append(tuple(label for label in named if size_of[label] != 1))
            continue
        for factor in (term.lora_A, term.lora_B):
            pairs = zip((*named, rank_label), factor.shape, strict=True)
            operands.append(tuple(label for label, size in pairs if size != 1))
    return plan_product(operands, output, size_of)


def _chosen(
    interpreter: Interpreter,
    equation: Equation,
    position: int,
    inputs: Sequence[Any],
    labels: Sequence[Labels],
    plans: Sequence[Plan],
) -> Any:
    """Returns the operand to compute with: dense if that is cheaper, else unchanged."""
    value = inputs[position]
    if not isinstance(value, Factored):
        return value
    base_flops = 2 * math.prod(_sizes(inputs, labels).values())
    return chosen(
        interpreter.reporter,
        equation,
        value,
        base_flops,
        [plan.flops for plan in plans],
        may_build=not interpreter.dropout.is_active,
    )


def _changing(
    interpreter: Interpreter,
    equation: Equation,
    use: int,
    operands: Sequence[Any],
    summand: Sequence[tuple[Term, Plan] | None],
    *context: Any,
) -> tuple[Any, ...]:
    """Returns `_change` as a function of the operands that stand for themselves, and those."""
    places = [place for place, part in enumerate(summand) if part is None]

    def change(*own: Any) -> Array:
        by_place = dict(zip(places, own, strict=True))
        mixed = [by_place.get(place, operand) for place, operand in enumerate(operands)]
        return _change(interpreter, equation, use, mixed, summand, *context)

    return change, *(operands[place] for place in places)


def _change(
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
        **_sizes(operands, labels),
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


def _sizes(inputs: Sequence[Any], labels: Sequence[Labels]) -> dict[int, Size]:
    return {
        label: size
        for value, named in zip(inputs, labels, strict=True)
        for label, size in zip(named, value.shape, strict=True)
    }


def _with_rows(
    result: Array, x: Array, x_labels: Labels, probe: Term, labels: Labels, output: Labels
) -> Array:
    """Returns `result`, the rows of x recorded if the op sums over the weight's input axes."""
    held = {label for label, size in zip(labels, probe.lora_A.shape, strict=False) if size != 1}
    summed = {label for label in x_labels if label in labels and label not in output}
    if held - set(output) != {
        label
        for label, size in zip(x_labels, x.shape, strict=True)
        if label in summed and size != 1
    }:
        return result
    rank_label = rank_label_of(0, (x_labels, labels))
    x = x.astype(jnp.float32)
    operands = [
        without_unit_axes(array, named)
        for array, named in ((x, x_labels), (probe.lora_A, (*labels, rank_label)))
    ]
    hidden = product(operands, (*output, rank_label), precision=jax.lax.Precision.HIGHEST)
    counter = without_unit_axes(probe.lora_B, (*labels, rank_label))
    # Along the weight's outputs any index will do: a row is multiplied by all of them.
    outputs = [axis for axis, name in enumerate(counter.labels) if name not in hidden.labels]
    held_labels = [name for name in counter.labels if name in hidden.labels]
    order = [name for name in hidden.labels[:-1] if name in held_labels]
    rows = jnp.max(counter.array, axis=tuple(outputs)).transpose(
        [held_labels.index(name) for name in order]
    )
    absent = [axis for axis, name in enumerate(hidden.labels[:-1]) if name not in order]
    rows = jnp.broadcast_to(jnp.expand_dims(rows, absent), hidden.array.shape[:-1])
    return recorded(result, hidden.array, rows)


def rules() -> dict[Primitive, Rule]:
    """Returns the rule of `dot_general`."""
    return {primitives.dot_general_p: Rule(factors=dot_general, roles=roles, rows=rows)}
