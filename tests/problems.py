"""Numbers for a case and a variant, and what the dense weights give for them in float64."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from tests.battery.problems import Dense
from tests.cases import Case
from tests.evaluation import evaluate
from tests.trained import as_if_trained
from tests.variants import Variant

EXAMPLES = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A case with numbers: plain and wrapped parameters, and a few examples."""

    case: Case
    variant: Variant
    params: dict[str, Any]
    wrapped: Any
    trained: Any
    xs: jax.Array


def params_of(case: Case, *, seed: int = 7) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    return {
        name: jax.device_put((random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))
        for name, shape in case.shapes.items()
    }


def wrapped_of(case: Case, variant: Variant, params: Any, *, alpha: float, seed: int) -> Any:
    return lora_jax.wrap(
        params,
        case.targets,
        rank=case.rank,
        alpha=alpha,
        key=jax.random.key(seed),
        axes=case.axes,
        **variant.options,
    )


@functools.cache
def problem_of(case: Case, variant: Variant) -> Problem:
    random = np.random.default_rng(11)
    params = params_of(case)
    wrapped = wrapped_of(case, variant, params, alpha=3.0, seed=7)
    shape = (EXAMPLES, *case.x_shape)
    xs = (
        random.integers(0, min(next(iter(case.shapes.values()))[0], 30), shape, np.int32)
        if case.integer_x
        else random.standard_normal(shape).astype(np.float32)
    )
    return Problem(case, variant, params, wrapped, as_if_trained(wrapped), jax.device_put(xs))


def objective(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda params, x: jnp.sum(jnp.sin(fn(params, x)))


def output_and_gradient(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns the function to the output of a function, and the gradient of its objective."""

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = fn(params, x)
        return jnp.sum(jnp.sin(output)), output

    def both(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        differentiated = jax.value_and_grad(loss, has_aux=True, allow_int=True)
        (_, output), gradient = differentiated(params, x)
        return output, jax.tree.map(_number_like, gradient, params)

    return both


def _number_like(gradient: Any, leaf: Any) -> Any:
    """Returns a gradient; where whole numbers have none, zeros of their own dtype."""
    return jnp.zeros_like(leaf) if gradient.dtype == jax.dtypes.float0 else gradient


def output_alone(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda params, x: (fn(params, x), None)


def computed(case: Case, fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns the function to the output and, where JAX can, the gradient."""
    return output_and_gradient(fn) if case.reverse else output_alone(fn)


@functools.cache
def _dense_program(case: Case) -> tuple[Any, Any]:
    """Returns what a case gives for an example with plain weights, traced, and its structure."""
    params = {name: jax.ShapeDtypeStruct(shape, np.float64) for name, shape in case.shapes.items()}
    x = jax.ShapeDtypeStruct(case.x_shape, np.int32 if case.integer_x else np.float64)
    with jax.enable_x64(True):
        jaxpr, shapes = jax.make_jaxpr(computed(case, case.fn), return_shape=True)(params, x)
    return jaxpr, jax.tree.structure(shapes)


def _dense(case: Case, values: Any, x: np.ndarray) -> Any:
    """Returns the output and the gradient for an example, in NumPy: nothing is compiled."""
    jaxpr, structure = _dense_program(case)
    return jax.tree.unflatten(structure, evaluate(jaxpr, jax.tree.leaves((values, x))))


def dense_results(problem: Problem, wrapped: Any) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Returns the outputs and the gradients of each adapter, for each example, in float64."""
    dense = {
        name: Dense.of(node)
        for name, node in wrapped.items()
        if isinstance(node, lora_jax.LoRAWeight)
    }
    values = {
        name: dense[name].value if name in dense else np.asarray(leaf, np.float64)
        for name, leaf in wrapped.items()
    }
    xs = np.asarray(problem.xs)
    xs = xs if problem.case.integer_x else xs.astype(np.float64)
    outputs, gradients = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(_dense(problem.case, values, x) for x in xs)
    )
    if gradients is None:
        return outputs, None
    return outputs, {
        name: jax.tree.map(
            lambda *leaves: np.stack(leaves),
            *(each.gradient(of_value) for of_value in gradients[name]),
        )
        for name, each in dense.items()
    }
