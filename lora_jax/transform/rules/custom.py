"""Rules for functions with their own derivative rules, which the rewritten functions keep.

The public way to a function's own rule is to differentiate the equation: `jax.jvp` and `jax.vjp`
of it trace the user's rule to a jaxpr in plain weights, which is then interpreted with factored
ones. The rule is opaque, so it takes and returns a weight's tangent as a whole matrix; and
there is no LoRA dropout inside, since the rule could not know the masks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array

from lora_jax._compat import (
    Equation,
    Primitive,
    as_closed,
    emitted_primitive,
    evaluate_equation,
    primitives,
)
from lora_jax.transform._bases import stand_in
from lora_jax.transform._building import materialized
from lora_jax.transform._dense import dense_value
from lora_jax.transform._factored import Factored
from lora_jax.transform._interpreter import Interpreter, scope_of
from lora_jax.transform.rules._rule import Rule


def custom_jvp_call(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> Sequence[Any]:
    """Returns the outputs of a `jax.custom_jvp` function, whose rule holds for the result."""
    body = equation.params["call_jaxpr"]
    interpreter = interpreter.within(equation).without_dropout()

    @jax.custom_jvp
    def rewritten(*values: Any) -> list[Array]:
        return materialized(interpreter.reporter, equation, interpreter.run(body, values))

    def jvp(values: Any, tangents: Any) -> tuple[Any, Any]:
        perturbed = [i for i in _varying(equation.invars) if not _all_leaves(_is_zero, tangents[i])]
        given = [_dense_tangent(values[i], tangents[i]) for i in perturbed]

        def rule(dense: list[Array], tangents: list[Array]) -> Any:
            function = _function_of(equation, dense, perturbed)
            outputs, changes = jax.jvp(function, [dense[i] for i in perturbed], tangents)
            return outputs, [changes[i] for i in _varying(equation.outvars)]

        closed_jaxpr = jax.make_jaxpr(rule)(_stand_ins(values), given)
        results = interpreter.run(closed_jaxpr, [*values, *given])
        arrays = materialized(interpreter.reporter, equation, results)
        count = len(equation.outvars)
        return arrays[:count], _with_zeros(equation.outvars, arrays[count:])

    rewritten.defjvp(jvp, symbolic_zeros=True)
    with scope_of(equation):
        return rewritten(*inputs)


def custom_vjp_call(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> Sequence[Any]:
    """Returns the outputs of a `jax.custom_vjp` function, whose rule holds for the result.

    The user's rule is applied only to what is differentiated, since it may refuse the rest.
    """
    body = equation.params["call_jaxpr"]
    interpreter = interpreter.within(equation).without_dropout()

    @jax.custom_vjp
    def rewritten(*values: Any) -> list[Array]:
        return materialized(interpreter.reporter, equation, interpreter.run(body, values))

    def forward(*primals: Any) -> tuple[Any, Any]:
        values = _map_primals(lambda primal: primal.value, primals)
        perturbed = [
            i
            for i in _varying(equation.invars)
            if not _all_leaves(lambda primal: not primal.perturbed, primals[i])
        ]

        def rule(dense: list[Array]) -> Any:
            return jax.vjp(_function_of(equation, dense, perturbed), *(dense[i] for i in perturbed))

        closed_jaxpr, shapes = jax.make_jaxpr(rule, return_shape=True)(_stand_ins(values))
        results = interpreter.run(closed_jaxpr, values)
        _, pullback = shapes
        count = len(equation.outvars)
        outputs = materialized(interpreter.reporter, equation, results[:count])
        weights = {i: values[i] for i in perturbed if isinstance(values[i], Factored)}
        structure = jax.tree.structure(pullback)
        return outputs, _Saved(results[count:], weights, tuple(perturbed), structure)

    def backward(saved: _Saved, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        given = [_instantiated(cotangents[i]) for i in _varying(equation.outvars)]

        def rule(residuals: list[Array], given: list[Array]) -> Any:
            pullback = jax.tree.unflatten(saved.pullback, residuals)
            return pullback(_with_zeros(equation.outvars, given))

        closed_jaxpr = jax.make_jaxpr(rule)(_stand_ins(saved.residuals), given)
        outputs = interpreter.run(closed_jaxpr, [*saved.residuals, *given])
        arrays = materialized(interpreter.reporter, equation, outputs)
        dense = dict(zip(saved.perturbed, arrays, strict=True))
        return tuple(
            None
            if i not in dense
            else _pulled_back(saved.weights[i], dense[i])
            if i in saved.weights
            else dense[i]
            for i in range(len(inputs))
        )

    rewritten.defvjp(forward, backward, symbolic_zeros=True)
    with scope_of(equation):
        return rewritten(*inputs)


def remat_opt(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs and residuals of a `jax.custom_vjp` with `optimize_remat`."""
    inner = interpreter.within(equation).without_dropout()
    return inner.run(as_closed(equation.params["fwd_jaxpr"]), inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Saved:
    """What the backward pass of a `jax.custom_vjp` function needs.

    Attributes:
      residuals: what the user's forward rule saved, of which some may be factored.
      weights: the factored inputs that are differentiated, by their position.
      perturbed: the positions of all inputs that are differentiated.
      pullback: the structure that turns the residuals into the user's backward rule.
    """

    residuals: list[Any]
    weights: dict[int, Factored]
    perturbed: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    pullback: Any = dataclasses.field(metadata={"static": True})


def _pulled_back(value: Factored, cotangent: Array) -> Any:
    """Returns a weight's cotangent as one of its factors."""
    return jax.vjp(dense_value, value)[1](cotangent)[0]


def _dense_tangent(value: Any, tangent: Any) -> Array:
    """Returns a value's tangent as an array, built from its factors' if it is factored."""
    tangent = jax.tree.map(_instantiated, tangent, is_leaf=_is_zero)
    if not isinstance(value, Factored):
        return tangent
    return jax.jvp(dense_value, (value,), (tangent,))[1]


def _function_of(equation: Equation, dense: Sequence[Array], varying: Sequence[int]) -> Any:
    """Returns the equation as a function of some of its inputs."""

    def function(*arrays: Array) -> list[Array]:
        inputs = list(dense)
        for i, array in zip(varying, arrays, strict=True):
            inputs[i] = array
        return evaluate_equation(equation, inputs)

    return function


def _varying(atoms: Sequence[Any]) -> list[int]:
    """Returns the positions of what can be differentiated among an equation's inputs or outputs."""
    return [i for i, atom in enumerate(atoms) if jnp.issubdtype(atom.aval.dtype, jnp.inexact)]


def _with_zeros(atoms: Sequence[Any], varying: Sequence[Any]) -> list[Any]:
    """Returns a tangent for each of these atoms, zero for those without one."""
    found = dict(zip(_varying(atoms), varying, strict=True))
    return [
        found[i] if i in found else np.zeros(atom.aval.shape, jax.dtypes.float0)
        for i, atom in enumerate(atoms)
    ]


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)


def _instantiated(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, SymbolicZero) else leaf


def _all_leaves(predicate: Callable[[Any], bool], tree: Any) -> bool:
    return all(map(predicate, jax.tree.leaves(tree, is_leaf=_is_leaf_of_rule)))


def _map_primals(function: Callable[[CustomVJPPrimal], Any], tree: Any) -> Any:
    return jax.tree.map(function, tree, is_leaf=_is_leaf_of_rule)


def _is_leaf_of_rule(leaf: Any) -> bool:
    return isinstance(leaf, CustomVJPPrimal | SymbolicZero)


def _stand_ins(values: Sequence[Any]) -> list[Any]:
    """Returns, for tracing, plain arrays of the same shapes."""
    return list(map(stand_in, values))


def rows_within(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of a function without its own derivative rule, which knows no probes."""
    return interpreter.within(equation).run(equation.params["call_jaxpr"], inputs)


def rules() -> dict[Primitive, Rule]:
    """Returns the rules of functions with derivative rules of their own."""

    @jax.custom_vjp
    def identity(x: Array) -> Array:
        return x

    identity.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent,), optimize_remat=True)
    return {
        emitted_primitive(
            lambda x: jax.vjp(identity, x)[0], jax.ShapeDtypeStruct((), "float32")
        ): Rule(factors=remat_opt),
        primitives.custom_jvp_call_p: Rule(factors=custom_jvp_call, rows=rows_within),
        primitives.custom_vjp_call_p: Rule(factors=custom_vjp_call, rows=rows_within),
    }
