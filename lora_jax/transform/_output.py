"""Which product gives a function's output: the head of a classifier or a language model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_jax._compat import ClosedJaxpr, Equation, Jaxpr, Literal, called_jaxpr

# An equation in a jaxpr, with the equations of the calls that lead to it: one jitted function may
# be a part of several layers.
Place = tuple[int, ...]


def place_of(equations: Sequence[Equation]) -> Place:
    """Returns an identifier of the last of these equations, reached by the calls before it."""
    return tuple(map(id, equations))


def head_products(closed_jaxpr: ClosedJaxpr, products: frozenset[Place]) -> frozenset[Place]:
    """Returns the products with weights that feed outputs and nothing else.

    A head is a product through which alone an output depends on all products before it, and which
    no other product uses. A residual stream ends at many products and so has no head; statistics
    or a cache that are returned beside the logits come from layers that others build on.
    """
    inputs: list[frozenset[Place]] = [frozenset()] * len(closed_jaxpr.jaxpr.invars)
    flow = _flow(products, closed_jaxpr.jaxpr, (), inputs)
    alone = {product for last in flow.last if len(last) == 1 for product in last}
    shared = {product for last in flow.last if len(last) > 1 for product in last}
    return frozenset((alone & products) - shared - flow.used_again)


@dataclasses.dataclass(frozen=True)
class _Flow:
    """What becomes of products with weights in a body or an equation.

    Attributes:
      last: for each output, the products that it last passed through.
      used_again: the products that feed into another one inside.
    """

    last: Sequence[frozenset[Place]]
    used_again: frozenset[Place]


def _flow(
    products: frozenset[Place], jaxpr: Jaxpr, callers: Place, inputs: Sequence[frozenset[Place]]
) -> _Flow:
    """Returns the flow through a body, from the last products of each of its inputs."""
    last: dict[Any, frozenset[Place]] = dict(zip(jaxpr.invars, inputs, strict=True))
    used_again: frozenset[Place] = frozenset()

    def last_of(atom: Any) -> frozenset[Place]:
        return frozenset() if isinstance(atom, Literal) else last.get(atom, frozenset())

    for equation in jaxpr.eqns:
        found = [last_of(atom) for atom in equation.invars]
        after = _flow_of_equation(products, equation, (*callers, id(equation)), found)
        last.update(zip(equation.outvars, after.last, strict=True))
        used_again |= after.used_again
    return _Flow([last_of(atom) for atom in jaxpr.outvars], used_again)


def _flow_of_equation(
    products: frozenset[Place],
    equation: Equation,
    place: Place,
    inputs: Sequence[frozenset[Place]],
) -> _Flow:
    body = called_jaxpr(equation)
    if body is not None:
        return _flow(products, body, place, inputs)
    joined = frozenset[Place]().union(*inputs)
    # Everything that a loop does with weights counts as one product here.
    if any(product[: len(place)] == place for product in products):
        return _Flow([frozenset({place})] * len(equation.outvars), joined)
    return _Flow([joined] * len(equation.outvars), frozenset())
