"""The interpreter: evaluates a jaxpr in which some values are factored weights."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from lora_jax._compat import (
    ClosedJaxpr,
    Equation,
    Jaxpr,
    Literal,
    evaluate_equation,
    name_scope,
    source_line,
)
from lora_jax.transform._cost import prefers_dense
from lora_jax.transform._dropout import Dropout
from lora_jax.transform._factored import Factored, Term, dense_flops, dense_value
from lora_jax.transform._report import OnMaterialize, Use, materialized

Rule = Callable[["Interpreter", Equation, list[Any]], Sequence[Any] | None]


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """Evaluates jaxprs, handing each equation that a factored weight reaches to its rule.

    Attributes:
      rules: for each primitive's name, the function that computes its outputs when an input is
        `Factored`. It returns None where it doesn't cover a case; then base + Σ terms is built.
      on_materialize: what to do where no rule covers an equation: `"warn"`, `"error"`, `"ignore"`.
      uses: what happened at each equation that a factored weight reached, in order.
      shared: inner functions that were rewritten already, so that what the model calls twice is
        traced once and is one function in the lowered program.
      dropout: LoRA dropout with a key for the jaxpr being evaluated; None in evaluation.
      callers: the equations whose bodies are being evaluated, the innermost last.
      times: how often the jaxpr being evaluated runs in one call, as far as that is known.
    """

    rules: Mapping[str, Rule]
    on_materialize: OnMaterialize
    uses: list[Use]
    shared: "dict[int, _SharedFunction]"
    dropout: Dropout | None = None
    callers: tuple[Equation, ...] = ()
    times: int = 1

    def run(self, closed_jaxpr: ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
        """Returns the outputs of a closed jaxpr; each argument is an array or `Factored`."""
        return self.run_open(closed_jaxpr.jaxpr, closed_jaxpr.consts, arguments)

    def run_open(
        self, jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]
    ) -> list[Any]:
        """Returns the outputs of a jaxpr for these constants and arguments."""
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
        own = [value.copied() if isinstance(value, Factored) else value for value in arguments]
        values.update(zip(jaxpr.invars, own, strict=True))

        def value_of(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            outputs = self.evaluate(equation, [value_of(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, outputs, strict=True))
        return [value_of(atom) for atom in jaxpr.outvars]

    def evaluate(self, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
        """Returns the outputs of one equation."""
        if not any(isinstance(value, Factored) for value in inputs):
            return evaluate_equation(equation, inputs)
        rule = self.rules.get(equation.primitive.name)
        outputs = None if rule is None else rule(self, equation, inputs)
        if outputs is not None:
            return outputs
        return evaluate_equation(equation, self.materialize(equation, inputs))

    def call_shared(
        self,
        equation: Equation,
        transformed: Callable[[Callable[..., Any]], Callable[..., Any]],
        inputs: Sequence[Any],
    ) -> Sequence[Any]:
        """Returns the outputs of an inner function that is rewritten and transformed only once.

        That holds for other weights of the same shapes too: inside, their places stand for them.
        """
        closed_jaxpr = equation.params["jaxpr"]
        once = dataclasses.replace(self.within(equation), times=1)
        if id(closed_jaxpr) not in self.shared:
            rewritten = transformed(
                lambda key, *arguments: once.with_key(key).run(closed_jaxpr, arguments)
            )
            self.shared[id(closed_jaxpr)] = _SharedFunction(closed_jaxpr, rewritten, {})
        function = self.shared[id(closed_jaxpr)]
        origins = list(dict.fromkeys(term.origin for term in _terms(inputs)))
        places = [_Place(index, str(origin)) for index, origin in enumerate(origins)]
        inputs = _with_origins(inputs, dict(zip(origins, places, strict=True)))
        first_new = len(self.uses)
        outputs = function.rewritten(self.next_key(), *inputs)
        traced = function.traced.setdefault(
            jax.tree.structure(inputs), _Traced(places, self.uses[first_new:])
        )
        paths = {str(old): str(new) for old, new in zip(traced.places, origins, strict=True)}
        self.uses[first_new:] = [
            dataclasses.replace(use, path=paths[use.path], times=self.times * use.times)
            for use in traced.uses
        ]
        return _with_origins(outputs, dict(zip(places, origins, strict=True)))

    def materialize(self, equation: Equation, inputs: Sequence[Any]) -> list[Any]:
        """Returns `inputs` with base + Σ terms built where no rule can do without it."""
        where = equation.primitive.name, self.source_of(equation)
        return [
            self.materialized_value(value, *where) if isinstance(value, Factored) else value
            for value in inputs
        ]

    def materialized_value(self, value: Factored, primitive: str, source: str) -> jax.Array:
        """Returns base + Σ terms, which `primitive` at `source` needs; warns or raises."""
        materialized(value.path, primitive, source, self.on_materialize)
        for path, part in value.parts().items():
            self.record(Use(path, primitive, source, "materialized", 0, None, dense_flops(part)))
        return dense_value(value)

    def source_of(self, equation: Equation) -> str:
        """Returns the model's own line for an equation, or that of the call around it."""
        lines = (source_line(each) for each in (equation, *reversed(self.callers)))
        return next((line for line in lines if line is not None), "an unknown line")

    def chosen(
        self,
        equation: Equation,
        value: Factored,
        base_flops: int,
        factored_flops: Callable[[Factored], int],
    ) -> Factored | jax.Array:
        """Returns a weight as an op is to use it: built where that is cheaper, or as it is.

        Dropout is on the adapter's input, so a weight that is built could have none.

        Args:
          equation: the op.
          value: the weight.
          base_flops: operations of the op alone.
          factored_flops: from the weight, or a part of it, to the operations of its products.
        """
        building = dense_flops(value)
        is_dense = self.dropout is None and prefers_dense(
            base_flops, factored_flops(value), building
        )
        for path, part in value.parts().items():
            self.record(
                Use(
                    path=path,
                    primitive=equation.primitive.name,
                    source=self.source_of(equation),
                    how="dense" if is_dense else "factored",
                    base_flops=base_flops,
                    factored_flops=factored_flops(part),
                    dense_flops=dense_flops(part),
                )
            )
        return dense_value(value) if is_dense else value

    def record(self, use: Use) -> None:
        """Notes what happened at an equation, for `explain`."""
        self.uses.append(dataclasses.replace(use, times=self.times))

    def dropped_out(self, x: jax.Array) -> jax.Array:
        """Returns an adapter's input under a mask of its own; in evaluation, as it is."""
        return x if self.dropout is None else self.dropout(x)

    def scale_of(self, term: Term) -> jax.Array:
        """Returns a term's scale, with what its dropped-out inputs are to be multiplied by."""
        return term.scale if self.dropout is None else self.dropout.scaled(term.scale)

    def without_dropout(self) -> "Interpreter":
        """Returns an interpreter for a body that computes the same each time."""
        return dataclasses.replace(self, dropout=None)

    def next_key(self) -> PRNGKeyArray | None:
        """Returns a new key for a body's dropout; None in evaluation."""
        return None if self.dropout is None else self.dropout.next_key()

    def with_key(self, key: PRNGKeyArray | None) -> "Interpreter":
        """Returns an interpreter for a body with a dropout key of its own."""
        if self.dropout is None or key is None:
            return self
        return dataclasses.replace(self, dropout=self.dropout.with_key(key))

    def within(self, equation: Equation, times: int = 1) -> "Interpreter":
        """Returns an interpreter for the body of an equation, which runs `times` times."""
        return dataclasses.replace(
            self, callers=(*self.callers, equation), times=self.times * times
        )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for a weight inside a shared function, where only its position counts.

    The label is the path of the weight that the function was traced with, for messages.
    """

    index: int
    label: str = dataclasses.field(compare=False)

    def __str__(self) -> str:
        return self.label


@dataclasses.dataclass(frozen=True)
class _Traced:
    """What tracing a shared function recorded, and the places that the records speak of."""

    places: list[_Place]
    uses: list[Use]


@dataclasses.dataclass(frozen=True)
class _SharedFunction:
    """An inner function, with what was recorded for each structure of its inputs."""

    closed_jaxpr: ClosedJaxpr
    rewritten: Callable[..., Any]
    traced: dict[Any, _Traced]


def _terms(values: Sequence[Any]) -> list[Term]:
    return [term for value in values if isinstance(value, Factored) for term in value.terms]


def _with_origins(values: Sequence[Any], origins: Mapping[Any, Any]) -> list[Any]:
    """Returns the values with each term's origin replaced."""
    return [
        dataclasses.replace(
            value,
            terms=tuple(
                dataclasses.replace(term, origin=origins[term.origin]) for term in value.terms
            ),
        )
        if isinstance(value, Factored)
        else value
        for value in values
    ]


@contextlib.contextmanager
def scope_of(equation: Equation) -> Any:
    """Puts what is computed inside under the model's own named scopes, for profiles."""
    name = name_scope(equation)
    with jax.named_scope(name) if name else contextlib.nullcontext():
        yield
