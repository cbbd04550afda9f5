"""Rules for functions with derivative rules of their own: those hold for the rewritten function.

The public way to a function's own rule is to differentiate the equation: `jax.jvp` and `jax.vjp`
of it trace the user's rule to a jaxpr in plain weights, which is then interpreted with factored
ones. The rule is opaque, so what it takes or gives for a weight's tangent is a whole matrix; and
there is no LoRA dropout inside, since the rule could not know of the masks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import Equation, evaluate_equation
from lora_jax.transform._factored import Factored, base_of, dense_value
from lora_jax.transform._interpreter import Interpreter, Rule, scope_of


def custom_jvp_call(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> Sequence[Any]:
    """Returns the outputs of a `jax.custom_jvp` function, whose rule holds for the result."""
    body = equation.params["call_jaxpr"]
    interpreter = interpreter.within(equation).without_dropout()

    @jax.custom_jvp
    def rewritten(*values: Any) -> list[Array]:
        return interpreter.materialize(equation, interpreter.run(body, values))

    @rewritten.defjvp
    def _(values: Any, tangents: Any) -> tuple[Any, Any]:
        varying = _varying(values)
        dense_tangents = [
            jax.jvp(dense_value, (values[i],), (tangents[i],))[1]
            if isinstance(values[i], Factored)
            else tangents[i]
            for i in varying
        ]

        def rule(dense: list[Array], tangents: list[Array]) -> Any:
            function = _function_of(equation, dense, varying)
            return jax.jvp(function, [dense[i] for i in varying], tangents)

        closed_jaxpr, shapes = jax.make_jaxpr(rule, return_shape=True)(
            _stand_ins(values), dense_tangents
        )
        outputs = interpreter.run(closed_jaxpr, [*values, *dense_tangents])
        return jax.tree.unflatten(
            jax.tree.structure(shapes), interpreter.materialize(equation, outputs)
        )

    with scope_of(equation):
        return rewritten(*inputs)


def custom_vjp_call(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> Sequence[Any]:
    """Returns the outputs of a `jax.custom_vjp` function, whose rule holds for the result."""
    body = equation.params["call_jaxpr"]
    interpreter = interpreter.within(equation).without_dropout()
    varying = _varying(inputs)

    @jax.custom_vjp
    def rewritten(*values: Any) -> list[Array]:
        return interpreter.materialize(equation, interpreter.run(body, values))

    def forward(*values: Any) -> tuple[Any, Any]:
        def rule(dense: list[Array]) -> Any:
            return jax.vjp(_function_of(equation, dense, varying), *(dense[i] for i in varying))

        closed_jaxpr, shapes = jax.make_jaxpr(rule, return_shape=True)(_stand_ins(values))
        results = interpreter.run(closed_jaxpr, values)
        _, pullback = shapes
        count = len(results) - len(jax.tree.leaves(pullback))
        outputs = interpreter.materialize(equation, results[:count])
        return outputs, _Saved(results[count:], values, jax.tree.structure(pullback))

    def backward(saved: _Saved, cotangents: Any) -> tuple[Any, ...]:
        def rule(residuals: list[Array], cotangents: list[Array]) -> Any:
            return jax.tree.unflatten(saved.pullback, residuals)(cotangents)

        closed_jaxpr = jax.make_jaxpr(rule)(_stand_ins(saved.residuals), cotangents)
        outputs = interpreter.run(closed_jaxpr, [*saved.residuals, *cotangents])
        dense = dict(zip(varying, interpreter.materialize(equation, outputs), strict=True))
        return tuple(
            _pulled_back(value, dense[i]) if i in dense else None
            for i, value in enumerate(saved.values)
        )

    rewritten.defvjp(forward, backward)
    with scope_of(equation):
        return rewritten(*inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Saved:
    """What the backward pass of a `jax.custom_vjp` function needs.

    Attributes:
      residuals: what the user's forward rule saved, of which some may be factored.
      values: the function's inputs.
      pullback: the structure that makes the residuals the user's backward rule again.
    """

    residuals: list[Any]
    values: Any
    pullback: Any = dataclasses.field(metadata={"static": True})


def _pulled_back(value: Any, cotangent: Array) -> Any:
    """Returns a weight's cotangent as one of its factors."""
    if not isinstance(value, Factored):
        return cotangent
    return jax.vjp(dense_value, value)[1](cotangent)[0]


def _function_of(equation: Equation, dense: Sequence[Array], varying: Sequence[int]) -> Any:
    """Returns the equation as a function of its differentiable inputs."""

    def function(*arrays: Array) -> list[Array]:
        inputs = list(dense)
        for i, array in zip(varying, arrays, strict=True):
            inputs[i] = array
        return evaluate_equation(equation, inputs)

    return function


def _varying(values: Sequence[Any]) -> list[int]:
    """Returns which values can be differentiated."""
    return [i for i, value in enumerate(values) if jnp.issubdtype(value.dtype, jnp.inexact)]


def _stand_ins(values: Sequence[Any]) -> list[Any]:
    """Returns, for tracing, plain arrays of the same shapes."""
    return [base_of(value) for value in values]


RULES: dict[str, Rule] = {
    "custom_jvp_call": custom_jvp_call,
    "custom_vjp_call": custom_vjp_call,
}
