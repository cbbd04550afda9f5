"""The operations of a program's products, counted in its trace: loops as often as they run."""

import math
from collections.abc import Callable
from typing import Any

import jax

from lora_jax._compat import Equation, Jaxpr, inner_jaxprs


def product_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Returns two operations for each multiplication of every `dot_general`.

    A compiler counts the body of a loop once.

    Args:
      function: a function of arrays, whose loops are scans.
      *arguments: the shapes of its arguments.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Jaxpr) -> int:
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation: Equation) -> int:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        read, written = (each[0].aval.shape for each in (equation.invars, equation.outvars))  # type: ignore[attr-defined]
        inner = math.prod(read[axis] for axis in contracted)
        return 2 * math.prod(written) * inner
    found = sum(map(_flops, inner_jaxprs(equation)))
    return found * equation.params["length"] if equation.primitive.name == "scan" else found
