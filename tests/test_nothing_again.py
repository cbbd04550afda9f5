"""Law 9: a second call, another adapter, another α, another id: nothing is traced or compiled."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import serving
from tests.problems import output_and_gradient, params_of, problem_of, wrapped_of
from tests.variants import VARIANTS, Variant

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_WORK = ("/jax/core/compile/backend_compile_duration", _LOWERED)


@contextlib.contextmanager
def work_of_jax() -> Iterator[list[str]]:
    """Yields a list that names each lowering and compilation inside, by any part of the library.

    JAX reports a trace also where it finds that it has one: tests count those of their function.
    """
    work: list[str] = []

    def listener(event: str, duration: float, **_: Any) -> None:
        if event in _WORK:
            work.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield work
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@contextlib.contextmanager
def jax_does_nothing_but_run() -> Iterator[None]:
    """Fails if anything is lowered or compiled inside."""
    with work_of_jax() as work:
        yield
    assert not work


def adapters_of(variant: Variant) -> list[Any]:
    """Returns wrapped trees of one structure: trained, at the start, and of another α and key."""
    case = variant.chosen_cases()[0]
    problem = problem_of(case, variant)
    other = wrapped_of(case, variant, params_of(case, seed=5), alpha=7.0, seed=5)
    return [problem.trained, problem.wrapped, other]


@pytest.mark.usefixtures("promoted_ranks")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_another_adapter(variant: Variant, compiled: bool) -> None:
    case = variant.chosen_cases()[0]
    xs = np.asarray(problem_of(case, variant).xs)
    traces = []

    def fn(params: Any, x: jax.Array) -> jax.Array:
        traces.append(1)
        return case.fn(params, x)

    adapted = lora_jax.adapt(fn)
    called = jax.jit(output_and_gradient(adapted)) if compiled else adapted
    first, *others = (jax.tree.map(jnp.asarray, wrapped) for wrapped in adapters_of(variant))
    first_x, *other_xs = (jnp.asarray(x) for x in xs)
    called(first, first_x)
    # What both passes of a step need may trace the function more than once, but never again.
    counted = len(traces)
    with jax_does_nothing_but_run():
        for wrapped, x in zip([first, *others], [*other_xs, first_x], strict=True):
            called(wrapped, x)
    assert len(traces) == counted > 0


@functools.cache
def bank_of(dora: bool, seed: int) -> Any:
    random = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(random.standard_normal((6, 4)), jnp.float32)}
    keys = jax.random.split(jax.random.key(seed), 3)
    return serving.bank(
        [
            lora_jax.wrap(params, "kernel", rank=2, alpha=1.0 + i, key=key, dora=dora)
            for i, key in enumerate(keys)
        ]
    )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_other_ids_and_another_bank(dora: bool) -> None:
    batched = jax.jit(serving.adapt(lambda params, x: x @ params["kernel"]))
    x, ids = jnp.ones((3, 6)), [jnp.array(each) for each in ([0, 1, 2], [2, 2, -1])]
    banks = [bank_of(dora, seed) for seed in (0, 1)]
    batched(banks[0], ids[0], x)
    with jax_does_nothing_but_run():
        batched(banks[0], ids[1], x)
        batched(banks[1], ids[0], x)


def test_other_weights_of_an_active_sum() -> None:
    bank, x = bank_of(False, 0), jnp.ones((3, 6))

    @jax.jit
    def called(weights: jax.Array) -> jax.Array:
        fn = lora_jax.adapt(lambda params, x: x @ params["kernel"])
        return fn(serving.activate(bank, weights), x)

    several = [jnp.array(each) for each in ([1.0, 0.0, 0.5], [0.25, 0.75, 0.0])]
    called(several[0])
    with jax_does_nothing_but_run():
        called(several[1])


_ARITHMETIC = {
    "grown": lambda wrapped, weight: lora_jax.arithmetic.resize(wrapped, 3),
    "pruned": lambda wrapped, weight: lora_jax.arithmetic.resize(wrapped, 1),
    **{
        method: functools.partial(
            lambda wrapped, weight, **options: lora_jax.arithmetic.blend(
                [wrapped, wrapped], [weight, 1.0], **options
            ),
            method=method,
            density=0.5 if "dare" in method or "ties" in method else None,
        )
        for method in ("cat", "svd", "linear", "ties", "ties_svd", "dare_linear")
    },
}


@pytest.mark.parametrize("name", _ARITHMETIC)
def test_the_arithmetic_of_another_adapter(name: str) -> None:
    random = np.random.default_rng(1)
    params = {"kernel": jnp.asarray(random.standard_normal((6, 4)), jnp.float32)}
    trees = [
        lora_jax.wrap(params, "kernel", rank=2, alpha=alpha, key=jax.random.key(seed))
        for seed, alpha in enumerate((1.0, 3.0))
    ]
    _ARITHMETIC[name](trees[0], 0.5)
    with jax_does_nothing_but_run():
        _ARITHMETIC[name](trees[1], 0.25)


_ON_ONE_WEIGHT: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "merging": (lora_jax.merge, False),
    "merging DoRA": (lora_jax.merge, True),
    "growing": (lambda wrapped: lora_jax.arithmetic.resize(wrapped, 3), False),
    "pruning": (lambda wrapped: lora_jax.arithmetic.resize(wrapped, 1), False),
}


@pytest.mark.parametrize("name", _ON_ONE_WEIGHT)
def test_a_new_shape_is_one_program(name: str) -> None:
    """Outside of jit too: op by op, each shape would compile many and hold what lies between."""
    change, dora = _ON_ONE_WEIGHT[name]
    # Shapes that no other test has, so that none has compiled for them.
    first, second = (
        lora_jax.wrap({"kernel": jnp.ones((13, size))}, "kernel", rank=2, dora=dora)
        for size in (17, 19)
    )
    change(first)
    with work_of_jax() as work:
        change(second)
    assert work.count(_LOWERED) == 1
