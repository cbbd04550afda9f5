"""The model that calls an op, and what the dense weight gives for it in float64."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.battery.options import Call, Option
from tests.battery.problems import Problem
from tests.battery.registry import Op


def calls_of(op: Op, option: Option) -> tuple[str, tuple[Call, ...]]:
    """Returns which program of the op the model runs, and its calls.

    A weight meets itself in one equation; activations are computed from the weight twice.
    """
    if option.twice and op.gives_weights:
        return "twice", option.calls[:1]
    return "once", option.calls


def model_of(op: Op, option: Option) -> Callable[[Any, jax.Array], Any]:
    """Returns the function `(params, x) -> results` that a user would have written."""
    name, calls = calls_of(op, option)
    program = getattr(op, name)

    def model(params: Mapping[str, Any], x: jax.Array) -> dict[str, Mapping[str, jax.Array]]:
        functions = _functions(program)
        return {call.name: functions[call.how](*_inputs(call, params, x)) for call in calls}

    return model


def _functions(program: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Returns the program as each kind of call has it; all share one jitted function."""
    jitted = jax.jit(program)
    custom = jax.custom_jvp(jitted)
    custom.defjvp(lambda primals, tangents: jax.jvp(jitted, primals, tangents))
    return {"plain": program, "jit": jitted, "custom": custom}


def _inputs(call: Call, params: Mapping[str, Any], x: jax.Array) -> tuple[Any, Any, jax.Array]:
    first, second = (params["v"], params["w"]) if call.swapped else (params["w"], params["v"])
    x = x[:, ::-1] if call.other_rows else x
    return first, second.astype(first.dtype), x.astype(first.dtype)


def cotangents(results: Any) -> Any:
    """Returns fixed numbers of the results' shapes: what the loss multiplies them by."""
    return jax.tree.map(
        lambda y: jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape), results
    )


def loss_of(results: Any) -> jax.Array:
    """Returns the sum of all results times their cotangents."""
    products = jax.tree.map(
        lambda c, y: jnp.sum(c * y.astype(jnp.float32)), cotangents(results), results
    )
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))


@functools.cache
def _reference(op: Op, name: str) -> Callable[..., Any]:
    """Returns a program of an op on plain weights, with the gradients of both if it has any."""
    program = getattr(op, name)

    def with_gradients(w: Any, v: Any, x: jax.Array) -> tuple[Any, Any]:
        if not op.reverse:
            return program(w, v, x), None
        results, pullback = jax.vjp(lambda w, v: program(w, v, x), w, v)
        dtypes = jax.tree.map(lambda c, y: c.astype(y.dtype), cotangents(results), results)
        return results, pullback(dtypes)

    return jax.jit(with_gradients)


def expected_results(
    op: Op, problem: Problem, adapter: int, example: int
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the results of the dense weights, and the gradient of each weight's adapter."""
    name, calls = calls_of(op, problem.option)
    dense = problem.dense(adapter)
    values = {weight: each.value for weight, each in dense.items()}
    results: dict[str, Any] = {}
    gradients = {weight: np.zeros_like(value) for weight, value in values.items()}
    for call in calls:
        order = ("v", "w") if call.swapped else ("w", "v")
        x = problem.xs[example].astype(np.float64)
        x = x[:, ::-1] if call.other_rows else x
        with jax.enable_x64(True):
            inputs = [jnp.asarray(array) for array in (*(values[each] for each in order), x)]
            given, gradient = jax.device_get(_reference(op, name)(*inputs))
        results[call.name] = given
        for weight, change in zip(order, gradient or (), strict=False):
            gradients[weight] = gradients[weight] + change
    if not op.reverse:
        return results, None
    return results, {weight: dense[weight].gradient(gradients[weight]) for weight in dense}
