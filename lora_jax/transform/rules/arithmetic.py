"""Rules for sums of weights, and for weights times numbers and arrays."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import Equation, Primitive, is_tracer, primitives
from lora_jax._dtypes import common_dtype
from lora_jax._shapes import Size
from lora_jax.transform._bases import computed_with_bases, moved_bases
from lora_jax.transform._factored import Factored, gain_of, terms_of
from lora_jax.transform._interpreter import Evaluation, Interpreter
from lora_jax.transform._roles import of_weights_alone
from lora_jax.transform._terms import Term
from lora_jax.transform.rules._rule import Rule


def neg(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the negated weight: base and scale change sign."""
    (value,) = inputs
    terms = tuple(dataclasses.replace(term, scale=-term.scale) for term in value.terms)
    return [Factored(moved_bases(equation, inputs)[0], terms, value.gain)]


def mul(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns the weight times a scalar, or times an array on axes that one factor holds."""
    if all(isinstance(value, Factored) for value in inputs):
        return None
    value, other = inputs if isinstance(inputs[0], Factored) else reversed(inputs)
    return _rescaled(equation, inputs, value, other, jnp.multiply)


def div(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns the weight divided by a scalar, or by an array on axes that one factor holds."""
    value, other = inputs
    if not isinstance(value, Factored) or isinstance(other, Factored):
        return None
    return _rescaled(equation, inputs, value, other, jnp.divide)


def add(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns a weight plus an array, or the sum of two weights: bases add, terms are listed."""
    if any(gain_of(value) is not None for value in inputs):
        return None
    base = _summed_bases(equation, inputs)
    return [
        Factored(base, tuple(term for value in inputs for term in _terms_on(value, base.shape)))
    ]


def sub(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any] | None:
    """Returns the difference of a weight and an array or another weight."""
    if any(gain_of(value) is not None for value in inputs):
        return None
    base = _summed_bases(equation, inputs)
    first, second = (_terms_on(value, base.shape) for value in inputs)
    negated = tuple(dataclasses.replace(term, scale=-term.scale) for term in second)
    return [Factored(base, first + negated)]


def _summed_bases(equation: Equation, inputs: Sequence[Any]) -> Any:
    """Returns the sum or difference of the bases: with an array, an array; else a base."""
    with_array = any(not isinstance(value, Factored) and jnp.ndim(value) for value in inputs)
    return (computed_with_bases if with_array else moved_bases)(equation, inputs)[0]


def _terms_on(value: Any, shape: tuple[Size, ...]) -> tuple[Term, ...]:
    """Returns the terms of a scalar, or of a value of as many axes, as terms of this shape.

    An axis of size 1 that grows is one on which no factor depends, so a term has no window there.
    """
    if not terms_of(value):
        return ()
    if value.ndim == len(shape):
        grown = [axis for axis, size in enumerate(shape) if value.shape[axis] != size]
        return terms_of(value.without_windows(grown))
    ones = (1,) * len(shape)
    return tuple(
        term.rearranged(
            term.lora_A.reshape(*ones, -1), term.lora_B.reshape(*ones, -1), (None,) * len(shape)
        )
        for term in terms_of(value)
    )


def _rescaled(
    equation: Equation,
    inputs: Sequence[Any],
    value: Factored,
    other: Any,
    operation: Callable[[Array, Array], Array],
) -> list[Any] | None:
    """Returns the value times or over an array that each term absorbs, into scale or one factor."""
    if value.ndim < jnp.ndim(other):  # one number of a weight, times an array
        return None
    grown = [axis for axis, size in enumerate(jnp.shape(other)) if 1 != size != value.shape[axis]]
    value = value.without_windows(grown)
    terms = [_rescaled_term(term, other, operation) for term in value.terms]
    absorbed = tuple(term for term in terms if term is not None)
    if len(absorbed) < len(terms):
        return None
    return [Factored(moved_bases(equation, inputs)[0], absorbed, value.gain)]


def _rescaled_term(
    term: Term,
    other: Any,
    operation: Callable[[Array, Array], Array],
) -> Term | None:
    array = jnp.asarray(other)
    if array.ndim == 0:
        scale = _in_common_dtype(operation, term.scale, array)
        alike = frozenset[str]() if is_tracer(other) else term.scale_alike_over
        return dataclasses.replace(term, scale=scale, scale_alike_over=alike)
    for axis, window in enumerate(term.window):
        if window is not None and array.shape[axis] != 1:
            array = window.taken(array, axis)
    held = {axis for axis, size in enumerate(array.shape) if size != 1}

    def absorbed(factor: Array) -> Array:
        return _in_common_dtype(operation, factor, array[..., None])

    if _holds(term.lora_A, held):
        return term.moved(absorbed(term.lora_A), term.lora_B)
    if _holds(term.lora_B, held):
        return term.moved(term.lora_A, absorbed(term.lora_B))
    return None


def _in_common_dtype(
    operation: Callable[[Array, Array], Array], first: Array, second: Array
) -> Array:
    """Returns the result of an operation in the wider dtype of two arrays."""
    dtype = common_dtype(first.dtype, second.dtype)
    return operation(first.astype(dtype), second.astype(dtype))


def _holds(factor: Array, axes: Collection[int]) -> bool:
    return all(factor.shape[axis] != 1 for axis in axes)


def rows_of_scaled(evaluation: Evaluation) -> Evaluation:
    """Returns `mul` or `div` for `input_moments`: along a weight's outputs its inputs are the same.

    Scaling a weight along its outputs leaves its rows unchanged; scaling it along its inputs scales
    them.
    """

    def evaluated(
        interpreter: Interpreter, equation: Equation, inputs: list[Any]
    ) -> Sequence[Any] | None:
        weights = [value for value in inputs if isinstance(value, Factored)]
        others = [value for value in inputs if not isinstance(value, Factored)]
        is_linear = evaluation is mul or isinstance(inputs[0], Factored)
        if is_linear and len(weights) == 1 and jnp.ndim(others[0]) == weights[0].ndim:
            held = [axis for axis, size in enumerate(others[0].shape) if size != 1]
            if all(term.lora_A.shape[axis] == 1 for term in weights[0].terms for axis in held):
                base = computed_with_bases(equation, inputs)[0]
                return [dataclasses.replace(weights[0], base=base)]
        return evaluation(interpreter, equation, inputs)

    return evaluated


def rules() -> dict[Primitive, Rule]:
    """Returns the rules of sums and of products of elements."""
    return {
        primitives.add_jaxvals_p: Rule(factors=add, roles=of_weights_alone(add)),
        primitives.add_p: Rule(factors=add, roles=of_weights_alone(add)),
        primitives.div_p: Rule(factors=div, roles=of_weights_alone(div), rows=rows_of_scaled(div)),
        primitives.mul_p: Rule(factors=mul, roles=of_weights_alone(mul), rows=rows_of_scaled(mul)),
        primitives.neg_p: Rule(factors=neg),
        primitives.sub_p: Rule(factors=sub, roles=of_weights_alone(sub)),
    }
