"""The interpreter: evaluates a jaxpr in which some values are factored weights."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from lora_jax._compat import (
    ClosedJaxpr,
    Equation,
    Jaxpr,
    Literal,
    Primitive,
    evaluate_equation,
    name_scope,
    settings_of,
)
from lora_jax._shapes import Size
from lora_jax.transform._bases import computed_with_bases
from lora_jax.transform._building import materialized_inputs
from lora_jax.transform._dropout import Dropout, NoDropout
from lora_jax.transform._factored import Factored
from lora_jax.transform._report import Reporter
from lora_jax.transform._sharing import SharedFunctions

# Returns the outputs of an equation of which an input is `Factored`; each is an array or
# `Factored`. None where the case at hand is not covered: then base + Σ terms is built.
Evaluation = Callable[["Interpreter", Equation, list[Any]], Sequence[Any] | None]


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """Evaluates jaxprs, and passes each equation that a factored weight reaches to its rule.

    Attributes:
      evaluations: what is done at each primitive that has a rule.
      shared: the inner functions rewritten so far, so that a function that the model calls twice is
        traced once and appears once in the lowered program.
      reporter: records each equation that a factored weight reaches.
      dropout: LoRA dropout at the equation being evaluated.
      may_merge: whether an op may multiply by W + AB, with the gradients of the factors.
    """

    evaluations: Mapping[Primitive, Evaluation]
    shared: SharedFunctions
    reporter: Reporter = dataclasses.field(default_factory=Reporter)
    dropout: Dropout | NoDropout = dataclasses.field(default_factory=NoDropout)
    may_merge: bool = True

    def run(self, closed_jaxpr: ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
        """Returns the outputs of a closed jaxpr; each argument is an array or `Factored`."""
        return self.run_open(closed_jaxpr.jaxpr, closed_jaxpr.consts, arguments)

    def run_open(
        self, jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]
    ) -> list[Any]:
        """Returns the outputs of a jaxpr for these constants and arguments."""
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, map(_aligned, arguments), strict=True))

        def value_of(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for place, equation in enumerate(jaxpr.eqns):
            inputs = [value_of(atom) for atom in equation.invars]
            outputs = self._at(place).evaluate(equation, inputs)
            values.update(zip(equation.outvars, map(_aligned, outputs), strict=True))
        return [value_of(atom) for atom in jaxpr.outvars]

    def evaluate(self, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
        """Returns the outputs of one equation."""
        if not any(isinstance(value, Factored) for value in inputs):
            return evaluate_equation(equation, inputs)
        evaluation = self.evaluations.get(equation.primitive)
        if evaluation is not None:
            with settings_of(equation):
                outputs = evaluation(self, equation, inputs)
            if outputs is not None:
                return outputs
        return computed_with_bases(equation, materialized_inputs(self.reporter, equation, inputs))

    def within(self, equation: Equation, times: Size = 1) -> "Interpreter":
        """Returns an interpreter for a body of an equation, which runs `times` times.

        With dropout, the body needs a key of its own as well.
        """
        return dataclasses.replace(self, reporter=self.reporter.within(equation, times))

    def with_key(self, key: PRNGKeyArray | None) -> "Interpreter":
        """Returns an interpreter for a body with a dropout key of its own, if it has one."""
        if key is None:
            return self
        return dataclasses.replace(self, dropout=self.dropout.with_key(key))

    def without_dropout(self) -> "Interpreter":
        """Returns an interpreter for a body that computes the same each time."""
        return dataclasses.replace(self, dropout=NoDropout())

    def within_mesh(self, axes: frozenset[str]) -> "Interpreter":
        """Returns an interpreter for the shards of a function that is mapped over mesh axes."""
        return dataclasses.replace(self, dropout=self.dropout.within_mesh(axes))

    def _at(self, place: int) -> "Interpreter":
        """Returns an interpreter for another equation of the same body."""
        dropout = self.dropout.at(place)
        return self if dropout is self.dropout else dataclasses.replace(self, dropout=dropout)


def _aligned(value: Any) -> Any:
    """Returns a value as the equations of one body take it."""
    if not isinstance(value, Factored):
        return value
    return value.with_aligned() if value.is_weight else value.base


@contextlib.contextmanager
def scope_of(equation: Equation) -> Iterator[None]:
    """Puts what is computed inside under the model's own named scopes, for profiles."""
    name = name_scope(equation)
    with jax.named_scope(name) if name else contextlib.nullcontext():
        yield
