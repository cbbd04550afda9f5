"""Rules for `dot_general`: the base op plus the products of the other operand and the factors."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import Equation, evaluate_equation
from lora_jax._dtypes import common_dtype
from lora_jax._shapes import AnyArray, Size
from lora_jax.transform._factored import (
    Factored,
    Term,
    Window,
    base_of,
    block_shape,
    dense_flops,
    multiplied,
    terms_of,
    without_windows,
)
from lora_jax.transform._interpreter import Interpreter, Rule, scope_of
from lora_jax.transform._product import (
    Labelled,
    Labels,
    plan_product,
    product,
    sharding_of,
    without_unit_axes,
)
from lora_jax.transform._report import Use


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
    choices = [
        _computed(interpreter, equation, position, inputs, labels, output)
        for position in range(len(inputs))
    ]
    result = evaluate_equation(equation, [base_of(choice) for choice in choices])[0]
    with scope_of(equation), jax.named_scope("lora"):
        summands = itertools.product(*([None, *terms_of(choice)] for choice in choices))
        for use, terms in enumerate(summands):
            if any(term is not None for term in terms):
                result += _change(
                    interpreter, equation, use, choices, terms, labels, output, result
                )
        for gain in gains:
            result = multiplied(result, gain).astype(result.dtype)
    return [result]


def _with_gains_outside(
    interpreter: Interpreter,
    equation: Equation,
    inputs: Sequence[Any],
    labels: Sequence[Labels],
    output: Labels,
) -> tuple[list[Any], list[Array]]:
    r"""Returns the operands without gains, and what the product is to be multiplied by instead.

    A gain g on axes that the product keeps comes out of it: $x (W \circ g) = (x W) \circ g$. On
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
                operands[1 - position] = _cut_as(other, scaled.astype(other.dtype))
            operands[position] = without_gain
        else:
            operands[position] = interpreter.materialize(equation, [value])[0]
    return operands, gains


def _cut_as(other: Array, scaled: Array) -> Array:
    """Returns an operand times a gain, cut over explicit mesh axes as the operand was.

    The gain is cut as its weight is. Both operands would be cut along an axis that the product sums
    over, of which JAX asks how the result is to be cut; the model's own operand left no question.
    """
    sharding = sharding_of(other)
    return scaled if sharding is None else jax.sharding.reshard(scaled, sharding)


def _in_axes_of(target: Labels, array: Array, labels: Labels) -> Array:
    """Returns an array that is the same everywhere but on axes of `target`, with those axes."""
    held = without_unit_axes(array, labels)
    order = [label for label in target if label in held.labels]
    in_order = held.array.transpose([held.labels.index(label) for label in order])
    return jnp.expand_dims(
        in_order, [axis for axis, label in enumerate(target) if label not in order]
    )


def _computed(
    interpreter: Interpreter,
    equation: Equation,
    position: int,
    inputs: Sequence[Any],
    labels: Sequence[Labels],
    output: Labels,
) -> Any:
    """Returns an operand as it is to be computed with: dense if that is cheaper, else as it is."""
    value = inputs[position]
    if not isinstance(value, Factored):
        return value
    size_of = _sizes(inputs, labels)
    base_flops = 2 * math.prod(size_of.values())

    def factored_flops(part: Factored) -> Size:
        return sum(
            _factored_flops(term, part.shape, labels, position, output, size_of)
            for term in part.terms
        )

    return interpreter.chosen(equation, value, base_flops, factored_flops)


def _factored_flops(
    term: Term,
    shape: tuple[Size, ...],
    labels: Sequence[Labels],
    position: int,
    output: Labels,
    size_of: Mapping[int, Size],
) -> Size:
    block = dict(zip(labels[position], block_shape(term, shape), strict=True))
    size_of = {**size_of, **block}
    rank_label = rank_label_of(position, labels)
    operands = [
        tuple(label for label in labels[other] if size_of[label] != 1)
        for other in range(len(labels))
        if other != position
    ]
    for factor in (term.lora_A, term.lora_B):
        depends = [size != 1 for size in factor.shape]
        named = (*labels[position], rank_label)
        operands.append(tuple(x for x, used in zip(named, depends, strict=True) if used))
    sizes = {**size_of, rank_label: term.rank}
    return plan_product(operands, output, sizes).flops(sizes)


def _change(
    interpreter: Interpreter,
    equation: Equation,
    use: int,
    operands: Sequence[Any],
    terms: Sequence[Term | None],
    labels: Sequence[Labels],
    output: Labels,
    result: Array,
) -> Array:
    """Returns one summand of the product, in the shape and dtype of `result`."""
    if sum(term is not None for term in terms) > 1:
        terms = [
            None if term is None else without_windows(term, operand.shape)
            for term, operand in zip(terms, operands, strict=True)
        ]
    ranges = _ranges(terms, labels)
    arrays: list[tuple[Array, Labels]] = []
    for position, (operand, term) in enumerate(zip(operands, terms, strict=True)):
        if term is None:
            array = _sliced(base_of(operand), labels[position], ranges)
            if not isinstance(operand, Factored):
                array = interpreter.dropped_out(array, use)
            arrays.append((array, labels[position]))
        else:
            named = (*labels[position], rank_label_of(position, labels))
            arrays += [(term.lora_A, named), (term.lora_B, named)]
    dtype = common_dtype(*(array.dtype for array, _ in arrays))
    dropped = any(not isinstance(operand, Factored) for operand in operands)
    scales = [term.scale for term in terms if term is not None]
    if dropped:
        scales[0] = interpreter.scale_of(next(term for term in terms if term is not None))
    count = _constant_count(operands, labels, output, ranges, arrays)
    if count != 1:
        scales.append(jnp.asarray(count, scales[0].dtype))
    joined = product(
        [without_unit_axes(array.astype(dtype), named) for array, named in arrays],
        output,
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
    """Returns over how many equal products a summand sums: along axes that none of its arrays has.

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


def ragged_dot_general(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> Sequence[Any] | None:
    """Returns each group of rows times the weight of its expert, through that expert's factors."""
    x, weight, group_sizes = inputs[0], inputs[1], jnp.asarray(inputs[2])
    numbers = equation.params["ragged_dot_dimension_numbers"]
    is_plain = (
        numbers.dot_dimension_numbers == (((1,), (1,)), ((), ()))
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )
    if not is_plain or isinstance(x, Factored) or equation.params["group_offset"] is not None:
        return None
    terms = [without_windows(term, weight.shape) for term in weight.terms]
    factors = [pair for pair in map(_expert_factors, terms) if pair is not None]
    # Gains of the form (experts, 1, out), one for each expert's output features.
    if len(factors) < len(terms) or 1 in weight.held_by_gain:
        return None
    result = evaluate_equation(equation, [x, weight.base, group_sizes])[0]
    for path, part in weight.parts().items():
        flops = sum(2 * x.shape[0] * term.rank * sum(weight.shape[1:]) for term in part.terms)
        interpreter.record(
            Use(
                path=path,
                primitive=equation.primitive.name,
                source=interpreter.source_of(equation),
                how="factored",
                base_flops=2 * x.size * weight.shape[2],
                factored_flops=flops,
                dense_flops=dense_flops(part),
            )
        )
    with scope_of(equation), jax.named_scope("lora"):
        for use, (term, (kernel, mixer)) in enumerate(zip(terms, factors, strict=True)):
            adapter_input = interpreter.dropped_out(x, use)
            scale = interpreter.scale_of(term)
            result += _expert_change(
                equation, adapter_input, kernel, mixer, scale, group_sizes, result
            )
        if weight.gain is not None:
            gain = _gain_of_rows(weight.gain.aligned.squeeze(-1), group_sizes, x.shape[0])
            result = multiplied(result, gain).astype(result.dtype)
    return [result]


def _gain_of_rows(gain: Array, group_sizes: Array, rows: Size) -> Array:
    """Returns the gain of the expert that each row goes to, of shape (rows, out)."""
    experts = jnp.broadcast_to(gain, (group_sizes.shape[0], *gain.shape[1:]))
    return jax.lax.ragged_dot(
        jnp.ones((rows, 1), gain.dtype), experts, group_sizes, precision=jax.lax.Precision.HIGHEST
    )


def _expert_factors(term: Term) -> tuple[Array, Array] | None:
    """Returns the factors of shapes (experts, in, 1, r) and (experts, 1, out, r), or None."""
    for kernel, mixer in ((term.lora_A, term.lora_B), (term.lora_B, term.lora_A)):
        if kernel.shape[2] == 1 and mixer.shape[1] == 1:
            return kernel, mixer
    return None


def _expert_change(
    equation: Equation,
    x: Array,
    kernel: Array,
    mixer: Array,
    scale: Array,
    group_sizes: Array,
    result: Array,
) -> Array:
    dtype = common_dtype(x.dtype, kernel.dtype, mixer.dtype)
    experts = group_sizes.shape[0]

    def of_each_expert(factor: Array, axis: int, size: Size) -> Array:
        """Returns a factor as (experts, size, r), whether it depends on these axes or not."""
        kernels = factor.squeeze(axis)
        return jnp.broadcast_to(kernels, (experts, size, kernels.shape[-1])).astype(dtype)

    def ragged_dot(x: Array, weight: Array) -> Array:
        return jax.lax.ragged_dot(
            x,
            weight,
            group_sizes,
            precision=equation.params["precision"],
            preferred_element_type=product_dtype(equation, dtype),
        )

    hidden = ragged_dot(x.astype(dtype), of_each_expert(kernel, 2, x.shape[1]))
    hidden = hidden * scale.astype(hidden.dtype)
    mixers = of_each_expert(mixer, 1, result.shape[1]).swapaxes(1, 2)
    return ragged_dot(hidden.astype(dtype), mixers).astype(result.dtype)


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


def _sizes(inputs: Sequence[Any], labels: Sequence[Labels]) -> dict[int, Size]:
    return {
        label: size
        for value, named in zip(inputs, labels, strict=True)
        for label, size in zip(named, value.shape, strict=True)
    }


RULES: dict[str, Rule] = {"dot_general": dot_general, "ragged_dot_general": ragged_dot_general}
