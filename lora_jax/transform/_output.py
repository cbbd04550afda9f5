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
    flow = _Flow(products, set())
    inputs: list[frozenset[Place]] = [frozenset()] * len(closed_jaxpr.jaxpr.invars)
    outputs = flow.through(closed_jaxpr.jaxpr, (), inputs)
    alone = {product for last in outputs if len(last) == 1 for product in last}
    shared = {product for last in outputs if len(last) > 1 for product in last}
    return frozenset((alone & products) - shared - flow.used_again)


@dataclasses.dataclass(frozen=True)
class _Flow:
    """Tracks, for each value, the products with weights that it last passed through.

    Attributes:
      products: the products with weights.
      used_again: collects the products that feed into another one.
    """

    products: frozenset[Place]
    used_again: set[Place]

    def through(
        self, jaxpr: Jaxpr, callers: Place, inputs: Sequence[frozenset[Place]]
    ) -> list[frozenset[Place]]:
        """Returns the last products of each output, from those of each input."""
        last: dict[Any, frozenset[Place]] = dict(zip(jaxpr.invars, inputs, strict=True))

        def last_of(atom: Any) -> frozenset[Place]:
            return frozenset() if isinstance(atom, Literal) else last.get(atom, frozenset())

        for equation in jaxpr.eqns:
            found = [last_of(atom) for atom in equation.invars]
            outputs = self._after(equation, (*callers, id(equation)), found)
            last.update(zip(equation.outvars, outputs, strict=True))
        return [last_of(atom) for atom in jaxpr.outvars]

    def _after(
        self, equation: Equation, place: Place, inputs: Sequence[frozenset[Place]]
    ) -> Sequence[frozenset[Place]]:
        body = called_jaxpr(equation)
        if body is not None:
            return self.through(body, place, inputs)
        joined = frozenset().union(*inputs)
        # Everything that a loop does with weights counts as one product here.
        if any(product[: len(place)] == place for product in self.products):
            self.used_again.update(joined)
            joined = frozenset({place})
        return [joined] * len(equation.outvars)
