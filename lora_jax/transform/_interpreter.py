"""The interpreter: evaluates a jaxpr in which some values are factored weights."""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
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
    settings_of,
    source_line,
)
from lora_jax._shapes import Size
from lora_jax.transform._cost import prefers_dense
from lora_jax.transform._dropout import Dropout
from lora_jax.transform._factored import (
    Factored,
    Term,
    dense_flops,
    dense_value,
    is_as_exact_dense,
)
from lora_jax.transform._report import Recorder, Use, ignore
from lora_jax.transform._sharing import (
    Place,
    SharedFunction,
    SharedFunctions,
    origins_of,
    with_origins,
)

Rule = Callable[["Interpreter", Equation, list[Any]], Sequence[Any] | None]


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """Evaluates jaxprs, handing each equation that a factored weight reaches to its rule.

    Attributes:
      rules: for each primitive's name, the function that computes its outputs when an input is
        `Factored`. It returns None where it doesn't cover a case; then base + Σ terms is built.
      shared: the inner functions that were rewritten already, so that what the model calls twice is
        traced once and is one function in the lowered program.
      recorder: what is told of each equation that a factored weight reaches.
      dropout: LoRA dropout at the equation being evaluated; None in evaluation.
      callers: the equations whose bodies are being evaluated, the innermost last.
      times: how often the jaxpr being evaluated runs in one call, as far as that is known.
    """

    rules: Mapping[str, Rule]
    shared: SharedFunctions
    recorder: Recorder = ignore
    dropout: Dropout | None = None
    callers: tuple[Equation, ...] = ()
    times: Size = 1

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

        for place, equation in enumerate(jaxpr.eqns):
            inputs = [value_of(atom) for atom in equation.invars]
            outputs = self._at(place).evaluate(equation, inputs)
            values.update(zip(equation.outvars, outputs, strict=True))
        return [value_of(atom) for atom in jaxpr.outvars]

    def evaluate(self, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
        """Returns the outputs of one equation."""
        if not any(isinstance(value, Factored) for value in inputs):
            return evaluate_equation(equation, inputs)
        rule = self.rules.get(equation.primitive.name)
        if rule is not None:
            with settings_of(equation):
                outputs = rule(self, equation, inputs)
            if outputs is not None:
                return outputs
        return evaluate_equation(equation, self.materialize(equation, inputs))

    def call_shared(
        self,
        equation: Equation,
        transformed: Callable[[Callable[..., Any]], Callable[..., Any]],
        settings: Hashable,
        inputs: Sequence[Any],
    ) -> Sequence[Any]:
        """Returns the outputs of an inner function that is rewritten and transformed only once.

        That holds for other weights of the same shapes too: inside, their places stand for them.

        Args:
          equation: the call.
          transformed: makes of the rewritten function the one that is called, as `jax.jit` does.
          settings: all of the equation's parameters that `transformed` depends on.
          inputs: the inputs of the call.
        """
        closed_jaxpr = equation.params["jaxpr"]
        origins = origins_of(inputs)
        places = [Place(index, str(origin)) for index, origin in enumerate(origins)]
        keyed = [self.body_key(), *with_origins(inputs, dict(zip(origins, places, strict=True)))]
        leaves, structure = jax.tree.flatten(keyed)
        # A jaxpr is hashed by identity, and the memo keeps it alive.
        masks = None if self.dropout is None else (self.dropout.rate, self.dropout.mesh_axes)
        signature = closed_jaxpr, settings, masks, structure, tuple(map(jax.typeof, leaves))
        function = self.shared.get(signature)
        if function is None:
            uses: list[Use] = []
            body = dataclasses.replace(
                self.within(equation),
                times=1,
                recorder=uses.append,
                # The memo outlives the trace that this key is of.
                dropout=None if self.dropout is None else self.dropout.with_key(None),
            )
            call = transformed(lambda key, *inputs: body.with_key(key).run(closed_jaxpr, inputs))
            outputs = call(*keyed)
            labels = tuple(str(place) for place in places)
            function = SharedFunction(call, labels, tuple(uses))
            self.shared.add(signature, function)
        else:
            outputs = function.call(*keyed)
        for use in function.uses_of(origins, self.times):
            self.recorder(use)
        return with_origins(outputs, dict(zip(places, origins, strict=True)))

    def materialize(self, equation: Equation, inputs: Sequence[Any]) -> list[Any]:
        """Returns `inputs` with base + Σ terms built where no rule can do without it."""
        where = equation.primitive.name, self.source_of(equation)
        return [
            self.materialized_value(value, *where) if isinstance(value, Factored) else value
            for value in inputs
        ]

    def materialized_value(self, value: Factored, primitive: str, source: str) -> jax.Array:
        """Returns base + Σ terms, which `primitive` at `source` needs."""
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
        base_flops: Size,
        factored_flops: Callable[[Factored], Size],
    ) -> Factored | jax.Array:
        """Returns a weight as an op is to use it: built where that is cheaper, or as it is.

        Dropout is on the adapter's input, so a weight that is built could have none; and one that
        is built in half precision would lose what the factors have in more.

        Args:
          equation: the op.
          value: the weight.
          base_flops: operations of the op alone.
          factored_flops: from the weight, or a part of it, to the operations of its products.
        """
        is_dense = (
            self.dropout is None
            and is_as_exact_dense(value)
            and prefers_dense(base_flops, factored_flops(value), dense_flops(value))
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
        """Tells what happened at an equation."""
        self.recorder(dataclasses.replace(use, times=self.times))

    def dropped_out(self, x: jax.Array, use: int = 0) -> jax.Array:
        """Returns an adapter's input under a mask of its own; in evaluation, as it is.

        Args:
          x: the input.
          use: tells apart the masks that one equation draws.
        """
        return x if self.dropout is None else self.dropout.dropped_out(x, use)

    def scale_of(self, term: Term) -> jax.Array:
        """Returns a term's scale, with what its dropped-out inputs are to be multiplied by."""
        return term.scale if self.dropout is None else self.dropout.scaled(term.scale)

    def without_dropout(self) -> "Interpreter":
        """Returns an interpreter for a body that computes the same each time."""
        return dataclasses.replace(self, dropout=None)

    def body_key(self, body: int = 0) -> PRNGKeyArray | None:
        """Returns the dropout key of one of the equation's bodies; None in evaluation."""
        return None if self.dropout is None else self.dropout.key_of(body)

    def with_key(self, key: PRNGKeyArray | None) -> "Interpreter":
        """Returns an interpreter for a body with a dropout key of its own."""
        if self.dropout is None or key is None:
            return self
        return dataclasses.replace(self, dropout=self.dropout.with_key(key))

    def within(self, equation: Equation, times: Size = 1) -> "Interpreter":
        """Returns an interpreter for a body of an equation, which runs `times` times.

        With dropout, the body needs a key of its own as well.
        """
        return dataclasses.replace(
            self, callers=(*self.callers, equation), times=self.times * times
        )

    def within_mesh(self, axes: frozenset[str]) -> "Interpreter":
        """Returns an interpreter for the shards of a function that is mapped over mesh axes."""
        if self.dropout is None:
            return self
        return dataclasses.replace(self, dropout=self.dropout.within_mesh(axes))

    def _at(self, place: int) -> "Interpreter":
        """Returns an interpreter for another equation of the same body."""
        if self.dropout is None:
            return self
        return dataclasses.replace(self, dropout=self.dropout.at(place))


@contextlib.contextmanager
def scope_of(equation: Equation) -> Any:
    """Puts what is computed inside under the model's own named scopes, for profiles."""
    name = name_scope(equation)
    with jax.named_scope(name) if name else contextlib.nullcontext():
        yield
