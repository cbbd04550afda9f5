"""What rules need from the frozen base of a weight, whatever its kind.

A base passes through an equation in one of two ways. An op that moves a weight (a transpose, a
slice, a change of dtype) is applied to the base, and gives a base. An op that computes with a
weight (a product, a convolution, a sum) takes the base as an array. Loops and calls take it as a
tree of arrays that they cut along the first axis.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from lora_jax._compat import Equation, evaluate_equation
from lora_jax.transform._factored import Factored


def base_of(value: Any) -> Any:
    """Returns the base of a factored value, or the value itself if it is an array."""
    return value.base if isinstance(value, Factored) else value


def array_of(value: Any) -> Any:
    """Returns the array that an op computes with: the base's, or the value itself."""
    return base_of(value)


def put_base(value: Factored, put: Callable[[Array], Array]) -> Any:
    """Returns the base of a value with each of its arrays put somewhere, or laid out anew."""
    return jax.tree.map(put, value.base)


def moved_bases(equation: Equation, inputs: Sequence[Any]) -> list[Any]:
    """Returns the outputs of an equation that moves weights, applied to their bases."""
    return evaluate_equation(equation, [base_of(value) for value in inputs])


def computed_with_bases(equation: Equation, inputs: Sequence[Any]) -> list[Any]:
    """Returns the outputs of an equation that computes with weights, of their bases alone."""
    return evaluate_equation(equation, [array_of(value) for value in inputs])
