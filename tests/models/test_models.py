"""Models of third parties, adapted as they are, against their dense weights in float64."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree, norm
from tests.models import equinox, haiku, language, linen, nnx  # noqa: F401  each adds its rows
from tests.models.model import MODELS, Model, roles
from tests.trained import as_if_trained

ALSO_WITH_DORA = frozenset(
    {
        "equinox_attention",
        "linen_grouped_depthwise_and_transposed_convolutions",
        "linen_language_model_with_tied_head",
        "linen_scan_over_remat",
        "nnx_experts",
        "penzai_gemma2",
    }
)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A model with numbers: what is known of its weights, and its parameters with adapters."""

    model: Model
    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    axes: lora_jax.transform.InferredAxes
    wrapped: Any

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments of the adapted function."""
        return self.wrapped, *self.args


class Step(NamedTuple):
    """What a compiled gradient step gave, and the operations that it takes."""

    outputs: list[Any]
    gradients: Any
    flops: float


# Of module scope, so that one model's tests follow each other and share what is compiled.
@pytest.fixture(
    scope="module",
    params=[
        *((model, {}) for model in MODELS),
        *((model, {"dora": True}) for model in MODELS if model.name in ALSO_WITH_DORA),
    ],
    ids=lambda pair: "-".join([pair[0].name, *pair[1]]),
)
def problem(request: pytest.FixtureRequest) -> Iterator[Problem]:
    model, options = request.param
    with jax.numpy_dtype_promotion(model.promotion):
        yield make_problem(model, **options)


def make_problem(model: Model, **options: Any) -> Problem:
    fn, params, args = model.call()
    axes = lora_jax.infer_axes(fn, params, *args)
    wrapped = lora_jax.wrap(params, rank=2, alpha=3.0, **targets_and_axes(model, axes), **options)
    return Problem(model, fn, params, args, axes, as_if_trained(wrapped))


def targets_and_axes(model: Model, axes: lora_jax.transform.InferredAxes) -> dict[str, Any]:
    also = [re.escape(path) for path in (*model.also, *model.by_hand)]
    if not model.by_hand:
        return {"targets": also + ["all-linear"] * bool(model.linear), "axes": axes}
    by_hand = {path: roles(letters) for path, letters in model.by_hand.items()}
    return {"targets": [*also, *map(re.escape, model.linear)], "axes": {**axes, **by_hand}}


def test_axes_are_inferred(problem: Problem) -> None:
    """Each weight's axes are what its module's author made them."""
    expected = {**problem.model.linear, **problem.model.also}
    assert {path: problem.axes.get(path) for path in expected} == {
        path: roles(letters) for path, letters in expected.items()
    }


def test_all_linear_means_the_weights_of_products_but_the_head(problem: Problem) -> None:
    """No bias, norm scale, class token, position table, statistic, cache or head is among them."""
    assert set(problem.axes.linear) == set(problem.model.linear)


def test_every_weight_is_factored(problem: Problem) -> None:
    """Nothing is materialised but for a reason, and no adapter does nothing."""
    report = lora_jax.explain(problem.fn, *problem.inputs)
    assert not report.unused
    assert {use.path for use in report.materialized} == set(problem.model.materialized)
    uses = [use for target in report.targets for use in target.uses]
    assert {use.path for use in uses if use.how == "dense"} == problem.model.dense


def test_adapted_is_dense(problem: Problem) -> None:
    """Outputs and gradients are those of W + scale · AB."""
    actual, expected = adapted_step(problem), dense_step(problem)
    for name in ("outputs", "gradients"):
        wanted = getattr(expected, name)
        # What a deep model gives for a single weight may be next to nothing beside the rest.
        size = norm([norm(leaf) for leaf in jax.tree.leaves(wanted)])
        assert_agree(getattr(actual, name), wanted, size=size)


def test_no_more_operations_than_dense(problem: Problem) -> None:
    """The compiled gradient step takes no more operations than that of W + scale · AB."""
    assert adapted_step(problem).flops <= dense_step(problem).flops


@functools.cache
def adapted_step(problem: Problem) -> Step:
    on_materialize = "ignore" if problem.model.materialized else "error"
    return step(lora_jax.adapt(problem.fn, on_materialize=on_materialize), problem.inputs)


@functools.cache
def dense_step(problem: Problem) -> Step:
    """Returns the same for W + scale · AB in float64, which takes as many operations as float32."""

    def fn(wrapped: Any, *args: Any) -> Any:
        return problem.fn(lora_jax.merge(wrapped), *args)

    if problem.model.float32_because:
        return step(fn, problem.inputs)
    # A model may mix an integer index of its own with one of JAX's, which is now of 64 bits.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return step(fn, in_float64(problem.inputs))


def step(fn: Callable[..., Any], inputs: tuple[Any, ...]) -> Step:
    """Returns the outputs of `fn`, the gradients of their sines' sum, and the operations taken."""
    arrays, static = eqx.partition(inputs, eqx.is_array)

    def outputs_and_gradients(arrays: Any) -> tuple[list[jax.Array], Any]:
        wrapped, *args = eqx.combine(arrays, static)
        adapters, frozen = lora_jax.split(wrapped)

        def loss(adapters: Any) -> tuple[jax.Array, list[jax.Array]]:
            outputs = jax.tree.leaves(fn(lora_jax.combine(adapters, frozen), *args))
            return sum_of_sines(outputs), outputs

        gradients, outputs = jax.grad(loss, has_aux=True)(adapters)
        return outputs, gradients

    compiled = jax.jit(outputs_and_gradients).lower(arrays).compile()
    outputs, gradients = jax.device_get(compiled(arrays))
    return Step(outputs, gradients, compiled.cost_analysis()["flops"])


def sum_of_sines(outputs: list[jax.Array]) -> jax.Array:
    sines = [jnp.sum(jnp.sin(x)) for x in outputs if is_floating(x)]
    return sum(sines[1:], sines[0])


def in_float64(tree: Any) -> Any:
    # NumPy casts: JAX would compile a program for each shape.
    return jax.tree.map(
        lambda x: jax.device_put(np.asarray(x, np.float64)) if is_floating(x) else x, tree
    )


def is_floating(leaf: Any) -> bool:
    return eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
