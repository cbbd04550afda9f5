"""The laws of the design, for every case and transform, against the dense weight in float64."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.cases import Case
from tests.variants import VARIANTS, Variant

TOLERANCE = 1e-5
EXAMPLES = 3

pytestmark = pytest.mark.filterwarnings("ignore::lora_jax.MaterializationWarning")


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A case with numbers: plain and wrapped parameters, and a few examples."""

    case: Case
    variant: Variant
    params: dict[str, Any]
    wrapped: Any
    trained: Any
    xs: jax.Array


def name_of(row: Any) -> str:
    return row.name if hasattr(row, "name") else str(row)


@pytest.fixture(
    params=[(case, variant) for variant in VARIANTS for case in variant.chosen_cases()],
    ids=lambda pair: f"{pair[1].name}-{pair[0].name}",
)
def problem(request: pytest.FixtureRequest) -> Problem:
    return make_problem(*request.param)


@functools.cache
def make_problem(case: Case, variant: Variant) -> Problem:
    key = jax.random.key(7)
    params = {
        name: jax.random.normal(jax.random.fold_in(key, i), shape) / np.sqrt(shape[0])
        for i, (name, shape) in enumerate(case.shapes.items())
    }
    wrapped = lora_jax.wrap(
        params, case.targets, rank=case.rank, alpha=3.0, key=key, axes=case.axes, **variant.options
    )
    xs_shape = (EXAMPLES, *case.x_shape)
    xs = (
        jax.random.randint(key, xs_shape, 0, min(next(iter(case.shapes.values()))[0], 30))
        if case.integer_x
        else jax.random.normal(key, xs_shape)
    )
    return Problem(case, variant, params, wrapped, as_if_trained(wrapped), xs)


def as_if_trained(wrapped: Any) -> Any:
    """Returns the tree with other numbers in what trains: as lora_B is zero, in that at least."""
    key = jax.random.key(11)
    trained = {
        "lora_A": lambda x: x + jax.random.normal(jax.random.fold_in(key, 1), x.shape) / 4,
        "lora_B": lambda x: x + jax.random.normal(key, x.shape) / 4,
        "magnitude": lambda x: x * jax.random.uniform(key, x.shape, minval=0.5, maxval=1.5),
    }
    return jax.tree.map(
        lambda label, x: trained[label](x) if label in trained else x,
        lora_jax.labels(wrapped),
        wrapped,
    )


def objective(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda params, x: jnp.sum(jnp.sin(fn(params, x)))


def gradient(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    return gradient_of(objective(fn))


def gradient_of(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns the gradient of a loss with respect to the factors alone."""

    def of_factors(wrapped: Any, x: jax.Array) -> Any:
        adapters, frozen = lora_jax.split(wrapped)
        return jax.grad(lambda a: loss(lora_jax.combine(a, frozen), x))(adapters)

    return of_factors


def scanned(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda wrapped, xs: jax.lax.scan(lambda carry, x: (carry, fn(wrapped, x)), 0, xs)[1]


def mean_over(batched: Callable[..., Any]) -> Callable[..., Any]:
    return lambda wrapped, xs: batched(wrapped, xs).mean(0)


@dataclasses.dataclass(frozen=True)
class Transform:
    """What is done to a function of (wrapped, x), and what that gives of the single results.

    Attributes:
      apply: from the function to one of (wrapped, xs).
      expected: from the outputs for each x, or the gradients, to what `apply` gives.
      differentiates: whether the gradients are meant.
    """

    apply: Callable[..., Callable[..., Any]]
    expected: Callable[[Any], Any]
    differentiates: bool = False


def the_first(results: Any) -> Any:
    return jax.tree.map(lambda x: x[0], results)


def all_of_them(results: Any) -> Any:
    return results


def the_mean(results: Any) -> Any:
    return jax.tree.map(lambda x: x.mean(0), results)


TRANSFORMS = {
    "eager": Transform(lambda fn: lambda wrapped, xs: fn(wrapped, xs[0]), the_first),
    "jit": Transform(lambda fn: jax.jit(lambda wrapped, xs: fn(wrapped, xs[0])), the_first),
    "vmap": Transform(lambda fn: jax.jit(jax.vmap(fn, (None, 0))), all_of_them),
    "scan": Transform(lambda fn: jax.jit(scanned(fn)), all_of_them),
    "grad": Transform(lambda fn: lambda wrapped, xs: gradient(fn)(wrapped, xs[0]), the_first, True),
    "vmap of grad": Transform(
        lambda fn: jax.jit(jax.vmap(gradient(fn), (None, 0))), all_of_them, True
    ),
    "grad of vmap": Transform(
        lambda fn: jax.jit(gradient_of(mean_over(jax.vmap(objective(fn), (None, 0))))),
        the_mean,
        True,
    ),
    "grad of scan": Transform(
        lambda fn: jax.jit(gradient_of(mean_over(scanned(objective(fn))))), the_mean, True
    ),
    "grad of remat of jit": Transform(
        lambda fn: jax.jit(
            lambda wrapped, xs: gradient_of(jax.checkpoint(jax.jit(objective(fn))))(wrapped, xs[0])
        ),
        the_first,
        True,
    ),
}


@functools.cache
def dense_results(problem: Problem, differentiates: bool) -> Any:
    """Returns, in float64, the outputs or the gradients of W + scale · AB for each example."""
    dense = problem_function(problem)
    fn = gradient(dense) if differentiates else dense
    with jax.enable_x64(True):
        wrapped, xs = in_float64(problem.trained), in_float64(problem.xs)
        results = jax.jit(lambda w, xs: [fn(w, x) for x in xs])(wrapped, xs)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(results))


def problem_function(problem: Problem) -> Callable[..., jax.Array]:
    return lambda wrapped, x: problem.case.fn(lora_jax.merge(wrapped), x)


def in_float64(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x, np.float64) if x.dtype.kind == "f" else x), tree
    )


def relative_error(actual: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(e, np.float64)) for a, e in pairs]
    size = np.sqrt(sum(np.sum(e**2) for _, e in pairs))
    return float(np.sqrt(sum(np.sum((a - e) ** 2) for a, e in pairs)) / max(size, 1e-30))


@pytest.mark.parametrize(
    ("case", "variant", "name"),
    [
        (case, variant, name)
        for variant in VARIANTS
        for case in variant.chosen_cases()
        for name in variant.transforms or TRANSFORMS
    ],
    ids=name_of,
)
def test_adapted_is_dense(case: Case, variant: Variant, name: str) -> None:
    """Law 2: adapt(f)(wrapped, x) = f(merge(wrapped), x), and so are its gradients."""
    problem = make_problem(case, variant)
    transform = TRANSFORMS[name]
    if transform.differentiates and not problem.case.reverse:
        pytest.skip("JAX has no reverse-mode derivative of this function")
    if "vmap" in name and not problem.case.batchable:
        pytest.skip("JAX has no batching rule for this function")
    actual = transform.apply(lora_jax.adapt(problem.case.fn))(problem.trained, problem.xs)
    expected = transform.expected(dense_results(problem, transform.differentiates))
    assert relative_error(actual, expected) < variant.tolerance


def test_how_it_is_computed(problem: Problem) -> None:
    """Each use is factored, dense by choice or materialised, as the case says."""
    report = lora_jax.explain(problem.case.fn, problem.trained, problem.xs[0])
    assert not report.unused
    assert {use.how for target in report.targets for use in target.uses} == problem.variant.how(
        problem.case
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_nothing_changes_at_initialisation(problem: Problem, compiled: bool) -> None:
    """Law 1: where lora_B is zero, the output is the base model's, bit for bit."""
    if compiled and not problem.case.exact_when_compiled:
        pytest.skip("XLA rounds the arithmetic on the base differently beside other work")
    transform = jax.jit if compiled else lambda fn: fn
    actual = transform(lora_jax.adapt(problem.case.fn))(problem.wrapped, problem.xs[0])
    expected = transform(problem.case.fn)(problem.params, problem.xs[0])
    if problem.variant.exact_at_initialisation:
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))
    else:
        assert relative_error(actual, expected) < TOLERANCE


def test_unwrap_gives_back_what_was_wrapped(problem: Problem) -> None:
    """Law 3: unwrap(wrap(p)) is p, bit for bit, also after training."""
    for name, weight in lora_jax.unwrap(problem.trained).items():
        if problem.variant.keeps_base:
            assert weight is problem.params[name]
        else:
            assert relative_error(weight, problem.params[name]) < TOLERANCE


def test_frozen_leaves_get_no_gradient(problem: Problem) -> None:
    """Law 4, when a caller differentiates the whole wrapped tree."""
    if not problem.case.reverse:
        pytest.skip("JAX has no reverse-mode derivative of this function")
    gradient = jax.jit(jax.grad(objective(lora_jax.adapt(problem.case.fn))))
    gradients = gradient(problem.trained, problem.xs[0])
    for node in gradients.values():
        if isinstance(node, lora_jax.LoRAWeight):
            for name in ("base", "scale", "squared_norm", "initial_A", "initial_B", *node.frozen):
                assert not np.any(jax.tree.leaves(getattr(node, name)))


def test_no_target_leaves_the_jaxpr_alone(problem: Problem) -> None:
    """Law 5: without an adapter, adapt(f) traces to the jaxpr of f."""
    expected = str(jax.make_jaxpr(problem.case.fn)(problem.params, problem.xs[0]))
    actual = str(jax.make_jaxpr(lora_jax.adapt(problem.case.fn))(problem.params, problem.xs[0]))
    assert without_addresses(actual) == without_addresses(expected)


def test_a_batch_of_adapters_is_a_loop(problem: Problem) -> None:
    """Law 7: a batch over stacked adapters, base unbatched, equals a loop over them."""
    if not problem.case.batchable:
        pytest.skip("JAX has no batching rule for this function")
    adapted = lora_jax.adapt(problem.case.fn)
    adapters, frozen = lora_jax.split(problem.trained)
    several = [jax.tree.map(lambda x, k=k: x * k, adapters) for k in (0.0, 1.0, -0.5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)

    def applied(adapters: Any, x: jax.Array) -> jax.Array:
        return adapted(lora_jax.combine(adapters, frozen), x)

    @jax.jit
    def looped(several: Any, xs: jax.Array) -> jax.Array:
        return jnp.stack([applied(a, x) for a, x in zip(several, xs, strict=True)])

    actual = jax.jit(jax.vmap(applied))(stacked, problem.xs)
    expected = looped(several, problem.xs)
    assert relative_error(actual, expected) < TOLERANCE


def without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "", text)
