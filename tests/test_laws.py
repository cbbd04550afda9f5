"""The laws of the design, as compiled programs, against the dense weight in float64.

The battery runs every op, layout and transform; here is what XLA makes of the cases, and what the
laws say beside the numbers. A law that no variant changes runs once for a case.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.cases import CASES, Case
from tests.problems import Problem, computed, dense_results, problem_of
from tests.variants import KINDS_OF_USE, VARIANTS, Variant

pytestmark = [
    pytest.mark.filterwarnings("ignore::lora_jax.MaterializationWarning"),
    pytest.mark.usefixtures("promoted_ranks"),
]

BY_NAME = {variant.name: variant for variant in VARIANTS}
FACTORS = ("lora_A", "lora_B", "magnitude")


def pairs(*names: str, kinds_of_use: bool = False) -> Any:
    """Parametrises a test with the cases of these variants, or of all."""
    chosen = [
        pytest.param(problem, id=f"{variant.name}-{problem[0].name}")
        for variant in (map(BY_NAME.__getitem__, names) if names else VARIANTS)
        for problem in ((case, variant) for case in variant.chosen_cases())
        if not kinds_of_use or problem[0].name in KINDS_OF_USE
    ]
    return pytest.mark.parametrize(
        ("case", "variant"),
        [param.values[0] for param in chosen],
        ids=[param.id for param in chosen],
    )


@functools.cache
def mapped(case: Case) -> Callable[..., Any]:
    """Returns the compiled function from wrapped parameters and examples to what each gives."""
    function = computed(case, lora_jax.adapt(case.fn))
    if case.batchable:
        return jax.jit(jax.vmap(function, (None, 0)))
    return jax.jit(lambda wrapped, xs: jax.lax.map(lambda x: function(wrapped, x), xs))


def assert_dense(problem: Problem, wrapped: Any, actual: Any, examples: Any = slice(None)) -> None:
    """Asserts that outputs, and the gradients of what trains, are those of the dense weights."""
    outputs, gradients = jax.tree.map(lambda leaf: leaf[examples], dense_results(problem, wrapped))
    assert_agree(actual[0], outputs, tolerance=problem.variant.tolerance)
    for name, expected in (gradients or {}).items():
        node = actual[1][name]
        trains = [leaf for leaf in expected if leaf not in node.frozen]
        # One factor's gradient can be small where the other's is not: they share a size.
        size = np.sqrt(sum(np.sum(np.square(expected[leaf])) for leaf in trains))
        assert_agree(
            {leaf: getattr(node, leaf) for leaf in trains},
            {leaf: expected[leaf] for leaf in trains},
            tolerance=problem.variant.tolerance,
            size=size,
        )


@pairs()
def test_adapted_is_dense(case: Case, variant: Variant) -> None:
    """Law 2: adapt(f)(wrapped, x) = f(merge(wrapped), x), and so are its gradients.

    Law 4: what is frozen gets none, when a caller differentiates the whole wrapped tree.
    """
    problem = problem_of(case, variant)
    actual = jax.device_get(mapped(case)(problem.trained, problem.xs))
    assert_dense(problem, problem.trained, actual)
    for node in (actual[1] or {}).values():
        if isinstance(node, lora_jax.LoRAWeight):
            for name in ("base", "scale", "squared_norm", "initial_A", "initial_B", *node.frozen):
                assert not np.any(jax.tree.leaves(getattr(node, name)))


@pairs("lora", "dora", "rows", kinds_of_use=True)
def test_adapted_is_dense_without_jit(case: Case, variant: Variant) -> None:
    problem = problem_of(case, variant)
    adapted = computed(case, lora_jax.adapt(case.fn))
    assert_dense(problem, problem.trained, adapted(problem.trained, problem.xs[0]), 0)


@pairs("lora", "rows", kinds_of_use=True)
def test_adapted_is_dense_scanned_and_rematerialised(case: Case, variant: Variant) -> None:
    problem = problem_of(case, variant)
    adapted = computed(case, jax.checkpoint(jax.jit(lora_jax.adapt(case.fn))))
    scanned = jax.jit(lambda wrapped, xs: jax.lax.map(lambda x: adapted(wrapped, x), xs))
    assert_dense(problem, problem.trained, scanned(problem.trained, problem.xs))


@pairs("lora", "dora", "rows", kinds_of_use=True)
def test_a_batch_of_adapters_is_a_loop(case: Case, variant: Variant) -> None:
    """Law 7: a batch over stacked adapters, base unbatched, gives what each of them does."""
    problem = problem_of(case, variant)
    adapters, frozen = lora_jax.split(problem.trained)
    several = [jax.tree.map(lambda x, k=k: x * k, adapters) for k in (0.5, 1.0, -0.5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    adapted = lora_jax.adapt(case.fn)
    actual = jax.jit(jax.vmap(lambda a, x: adapted(lora_jax.combine(a, frozen), x)))(
        stacked, problem.xs
    )
    for place, single in enumerate(several):
        outputs, _ = dense_results(problem, lora_jax.combine(single, frozen))
        assert_agree(actual[place], outputs[place], tolerance=variant.tolerance)


@pairs()
def test_nothing_changes_at_initialisation(case: Case, variant: Variant) -> None:
    """Law 1: where an adapter is new, the output is the base model's."""
    problem = problem_of(case, variant)
    outputs, _ = mapped(case)(problem.wrapped, problem.xs)
    expected, _ = dense_results(problem, problem.params)
    assert_agree(outputs, expected, tolerance=variant.tolerance)


@pairs("lora", "rows")
def test_nothing_changes_at_initialisation_bit_for_bit(case: Case, variant: Variant) -> None:
    """Law 1: where lora_B is zero, compiled or not, as far as XLA rounds the base's work alike."""
    problem = problem_of(case, variant)
    ways = [jax.jit] if case.exact_when_compiled else []
    ways += [lambda fn: fn] if case.name in KINDS_OF_USE or not ways else []
    for transform in ways:
        actual = transform(lora_jax.adapt(case.fn))(problem.wrapped, problem.xs[0])
        expected = transform(case.fn)(problem.params, problem.xs[0])
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


@pairs()
def test_unwrap_gives_back_what_was_wrapped(case: Case, variant: Variant) -> None:
    """Law 3: unwrap(wrap(p)) is p, bit for bit, also after training."""
    problem = problem_of(case, variant)
    for name, weight in lora_jax.unwrap(problem.trained).items():
        if variant.keeps_base:
            assert weight is problem.params[name]
        else:
            assert_agree(weight, problem.params[name])


@pairs("lora", "dora", "rows")
def test_how_it_is_computed(case: Case, variant: Variant) -> None:
    """Each use is factored, dense by choice or materialised, as the case says."""
    problem = problem_of(case, variant)
    report = lora_jax.explain(case.fn, problem.trained, problem.xs[0])
    assert not report.unused
    uses = [use for target in report.targets for use in target.uses if use.primitive != "norm"]
    assert {use.how for use in uses} == variant.how(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_target_leaves_the_jaxpr_alone(case: Case) -> None:
    """Law 5: without an adapter, adapt(f) traces to the jaxpr of f."""
    problem = problem_of(case, BY_NAME["lora"])
    expected = str(jax.make_jaxpr(case.fn)(problem.params, problem.xs[0]))
    actual = str(jax.make_jaxpr(lora_jax.adapt(case.fn))(problem.params, problem.xs[0]))
    assert without_addresses(actual) == without_addresses(expected)


def without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "", text)
