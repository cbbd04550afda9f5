"""What rules need from the frozen base of a weight, whatever its kind.

A base is an array, or deferred: a value such as a quantised weight, which becomes an array where an
op needs it. A deferred base crosses into loops and calls as its parts. An op that computes with it
computes the array too, within one rematerialised function, so that the backward pass keeps the
parts, and computes the array again.

An op uses a base in one of two ways. One that moves a weight (a transpose, a slice, a change of
dtype) gives a base. One that computes with it (a product, a convolution) gives arrays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax._compat import Equation, evaluate_equation
from lora_jax.transform._deferred import batch_ndim, dequantized, is_deferred, moved
from lora_jax.transform._factored import Factored


def base_of(value: Any) -> Any:
    """Returns the base of a factored value, or the value itself if it is an array."""
    return value.base if isinstance(value, Factored) else value


def array_of(value: Any) -> Any:
    """Returns the array that the base of a factored value stands for, or the value itself."""
    return dequantized(base_of(value))


def stand_in(value: Any) -> Any:
    """Returns a value of the same type as the array that a value stands for, for tracing."""
    base = base_of(value)
    return jax.eval_shape(dequantized, base) if is_deferred(base) else base


def stacked_base(value: Factored) -> Any:
    """Returns the base of a stack with all its arrays cut along the first axis, for a loop."""
    base = value.base
    return base if not is_deferred(base) or batch_ndim(base) else dequantized(base)


def rematerialized(function: Callable[..., Any], *values: Any) -> Any:
    """Returns `function(*values)`; where a base among them is deferred, only the values are kept.

    The rest of what the backward pass needs is computed again there.
    """
    if not any(is_deferred(base_of(value)) for value in values):
        return function(*values)
    return jax.checkpoint(function)(*values)


def moved_bases(equation: Equation, inputs: Sequence[Any]) -> list[Any]:
    """Returns the outputs of an equation that moves weights, applied to their bases."""
    bases = [base_of(value) for value in inputs]
    if not any(map(is_deferred, bases)):
        return evaluate_equation(equation, bases)
    return moved(equation, bases)


def computed_with_bases(equation: Equation, inputs: Sequence[Any]) -> list[Any]:
    """Returns the outputs of an equation that computes with weights, of their bases alone."""
    return rematerialized(
        lambda *bases: evaluate_equation(equation, list(map(dequantized, bases))),
        *map(base_of, inputs),
    )
