"""Which product gives a function's output: the head of a classifier or a language model."""

from collections.abc import Sequence
from typing import Any

from lora_jax._compat import ClosedJaxpr, Equation, Jaxpr, Var, called_jaxpr

_PRODUCTS = frozenset({"conv_general_dilated", "dot_general", "ragged_dot_general"})
_LOOPS = frozenset({"cond", "scan", "shard_map", "while"})


def output_equations(closed_jaxpr: ClosedJaxpr) -> frozenset[int]:
    """Returns the ids of the products through which alone an output depends on all before them.

    Going back from an output, every path that meets a product ends there. If all end at one
    product, it is the output's head; a residual stream ends at many, and has none.
    """
    ends = [
        _last_products(closed_jaxpr.jaxpr, [output])[0] for output in closed_jaxpr.jaxpr.outvars
    ]
    return frozenset(end for found in ends if len(found) == 1 for end in found)


def _last_products(jaxpr: Jaxpr, atoms: Sequence[Any]) -> tuple[set[int], set[Any]]:
    """Returns the ids of the products that `atoms` end at, and the inputs that they reach."""
    definitions = {output: equation for equation in jaxpr.eqns for output in equation.outvars}
    waiting = [atom for atom in atoms if isinstance(atom, Var)]
    seen: set[Any] = set()
    products: set[int] = set()
    while waiting:
        variable = waiting.pop()
        if variable in seen:
            continue
        seen.add(variable)
        if variable in definitions:
            ends, inputs = _before(definitions[variable], variable)
            products |= ends
            waiting += [atom for atom in inputs if isinstance(atom, Var)]
    return products, seen & set(jaxpr.invars)


def _before(equation: Equation, output: Any) -> tuple[set[int], Sequence[Any]]:
    """Returns the products that an equation's output ends at, and the inputs to go on from."""
    name = equation.primitive.name
    if name in _PRODUCTS or name in _LOOPS:
        return {id(equation)}, ()
    inner = called_jaxpr(equation)
    if inner is None:
        return set(), equation.invars
    position = equation.outvars.index(output)
    products, reached = _last_products(inner, [inner.outvars[position]])
    inputs = [
        outer
        for outer, variable in zip(equation.invars, inner.invars, strict=True)
        if variable in reached
    ]
    return products, inputs
