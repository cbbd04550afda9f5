"""`lora_jax.optimizer` around all that optax offers: as on the half, and nothing else moves."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from tests.agreement import assert_agree, assert_identical
from tests.updates.reference import gradients_like

pytestmark = pytest.mark.usefixtures("promoted_ranks")

Make = Callable[[], Any]


@pytest.fixture(autouse=True)
def promoted_ranks_of_optax() -> Iterator[None]:
    """Some of its transformations keep one number as an array of one axis."""
    with jax.numpy_rank_promotion("allow"):
        yield


# They take None for a setting of their own, and so no tree that holds None, a half included.
NOT_FOR_NONE = {"galore", "scale_by_galore", "scale_by_muon"}
# For gradients of each example, which have one more axis.
PER_EXAMPLE = {"differentially_private_aggregate", "dpsgd"}
DEPRECATED = {"optimistic_adam"}
# They measure what a function gives them, or are one.
OF_A_FUNCTION = {"measure_with_ema", "snapshot", "stateless", "stateless_with_tree_map"}
# What they take instead of the simple arguments below.
WITH_ARGUMENTS: dict[str, Make] = {
    "add_noise": lambda: optax.add_noise(0.01, 0.5, key=jax.random.key(0)),
    "noisy_sgd": lambda: optax.noisy_sgd(0.01, key=jax.random.key(0)),
    "scale_by_schedule": lambda: optax.scale_by_schedule(lambda count: 0.1 * count),
}


def by_simple_arguments() -> Iterator[tuple[str, Make]]:
    """Yields what makes each transformation of optax that `f()`, `f(0.01)` or the like makes."""
    left_out = NOT_FOR_NONE | PER_EXAMPLE | OF_A_FUNCTION | DEPRECATED
    for module in (optax, optax.contrib):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith("_") and name not in left_out:
                make = WITH_ARGUMENTS.get(name) or with_simple_arguments(function)
                if make is not None:
                    yield name, make


def with_simple_arguments(function: Callable[..., Any]) -> Make | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for arguments in ((), (0.01,), (0.01, 0.01)):
            try:
                made = function(*arguments)
            except Exception:
                continue
            if isinstance(made, optax.GradientTransformation):
                return lambda arguments=arguments: function(*arguments)
    return None


CLIPPED = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
SIMPLE: dict[str, Make] = {
    **dict(by_simple_arguments()),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 2),
    "conditionally_transform": lambda: optax.conditionally_transform(
        optax.adam(0.1), lambda step: step > 0
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "masked": lambda: optax.masked(
        optax.adam(0.1), lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    ),
    "mechanize": lambda: optax.contrib.mechanize(optax.adam(0.1)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), CLIPPED),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.adam(0.1), 0.1),
    "split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(optax.adam(0.1)),
}

# What needs the value, the gradient once more, or functions of the whole tree.
SEARCH = ("value", "grad", "value_fn")
INFORMED: dict[str, tuple[Make, tuple[str, ...]]] = {
    "backtracking": (
        lambda: optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15, store_grad=True)
        ),
        SEARCH,
    ),
    "polyak_sgd": (optax.polyak_sgd, ("value",)),
    "polyak_sgd in MultiSteps": (lambda: optax.MultiSteps(optax.polyak_sgd(), 2), ("value",)),
    "momo": (lambda: optax.contrib.momo(0.1), ("value",)),
    "momo_adam": (lambda: optax.contrib.momo_adam(0.1), ("value",)),
    "reduce_on_plateau": (
        lambda: optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
        ("value",),
    ),
    "sophia": (lambda: optax.contrib.sophia(0.1), ("obj_fn",)),
    "sam, opaque": (
        lambda: optax.contrib.sam(optax.sgd(0.1), CLIPPED, opaque_mode=True),
        ("grad_fn",),
    ),
}
SIMPLE = {name: make for name, make in SIMPLE.items() if name not in INFORMED}
# The line searches by themselves, and what estimates a Hessian, are above as a part of something.
for part in (
    "lbfgs",
    "scale_by_backtracking_linesearch",
    "scale_by_zoom_linesearch",
    "scale_by_polyak",
    "hutchinson_estimator_diag_hessian",
):
    del SIMPLE[part]


def test_most_of_optax_is_among_them() -> None:
    assert len(SIMPLE) > 70


def wrapped_params() -> Any:
    """Returns a tree whose arrays have one shape, so that few ops are compiled for all tests."""
    numbers = np.random.default_rng(0).normal(size=(4, 4, 4)).astype(np.float32)
    kernel, bias, mean, lora_B = map(jnp.asarray, numbers)
    params = {
        "kernel": kernel,
        "bias": bias,
        "frozen": {"mean": mean.at[0].set(-0.0), "steps": jnp.arange(3), "none": None},
    }
    wrapped = lora_jax.wrap(params, "kernel", rank=4, train="bias")
    return {**wrapped, "kernel": dataclasses.replace(wrapped["kernel"], lora_B=lora_B)}


def steps_of(tx: Any, params: Any, gradients: list[Any]) -> tuple[Any, Any]:
    state = tx.init(params)
    for each in gradients:
        updates, state = tx.update(each, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("make", SIMPLE.values(), ids=SIMPLE)
def test_steps_are_those_on_the_half(make: Make) -> None:
    """One program, op by op, on the same arrays: the same bits."""
    wrapped = wrapped_params()
    adapters, frozen = lora_jax.split(wrapped)
    gradients = [gradients_like(wrapped, seed) for seed in (3, 4)]
    after, state = steps_of(lora_jax.optimizer(make()), wrapped, gradients)
    expected, expected_state = steps_of(
        make(), adapters, [lora_jax.split(each)[0] for each in gradients]
    )
    assert_identical(lora_jax.split(after)[0], expected)
    assert_identical(lora_jax.split(after)[1], frozen)
    assert_identical(state, expected_state)


def value_of(tree: Any) -> jax.Array:
    """Returns a function of what trains that has no minimum at the start."""
    node, bias = tree["kernel"], tree["bias"].value
    return jnp.mean((node.lora_A @ node.lora_B - 1.0) ** 2) + jnp.mean((bias - 2.0) ** 2)


def informed_steps(tx: Any, params: Any, names: tuple[str, ...], count: int = 3) -> Any:
    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        value, gradient = jax.value_and_grad(value_of, allow_int=True)(params)
        known = {
            "value": value,
            "grad": gradient,
            "value_fn": value_of,
            "obj_fn": value_of,
            "grad_fn": lambda params, _: jax.grad(value_of, allow_int=True)(params),
        }
        updates, state = tx.update(gradient, state, params, **{name: known[name] for name in names})
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(count):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize(("make", "names"), INFORMED.values(), ids=INFORMED)
def test_extra_arguments_are_of_the_half(make: Make, names: tuple[str, ...]) -> None:
    wrapped = wrapped_params()
    adapters, frozen = lora_jax.split(wrapped)
    after, state = informed_steps(lora_jax.optimizer(make()), wrapped, names)
    expected, expected_state = informed_steps(make(), adapters, names)
    assert_agree(lora_jax.split(after)[0], expected)
    assert_identical(lora_jax.split(after)[1], frozen)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, expected_state)
    assert value_of(after) < value_of(wrapped)


def test_a_line_search_takes_its_gradient_from_the_state() -> None:
    """The state of the whole tree is that of the half, on which optax's own helper finds it."""
    wrapped = wrapped_params()
    adapters, frozen = lora_jax.split(wrapped)
    tx = lora_jax.optimizer(optax.lbfgs())
    state = tx.init(wrapped)

    def loss(adapters: Any) -> jax.Array:
        return value_of(lora_jax.combine(adapters, frozen))

    @jax.jit
    def step(adapters: Any, state: Any) -> tuple[Any, Any]:
        value, gradient = optax.value_and_grad_from_state(loss)(adapters, state=state)
        updates, state = tx.update(
            gradient, state, adapters, value=value, grad=gradient, value_fn=loss
        )
        return optax.apply_updates(adapters, updates), state

    for _ in range(3):
        adapters, state = step(adapters, state)
    after, whole_state = informed_steps(tx, wrapped, SEARCH)
    assert_agree(lora_jax.split(after)[0], adapters, tolerance=1e-4)
    assert_identical(lora_jax.split(after)[1], frozen)
    assert jax.tree.structure(whole_state) == jax.tree.structure(state)
    assert value_of(after) < 0.1 * value_of(wrapped)


def test_parameters_are_found_in_the_state() -> None:
    wrapped = wrapped_params()
    tx = lora_jax.optimizer(optax.chain(optax.clip(1.0), optax.adam(0.1)))
    doubled = optax.tree.map_params(tx, lambda x: x + 1, tx.init(wrapped))
    moments = optax.tree.get(doubled, "mu")
    assert_identical(moments, jax.tree.map(jnp.ones_like, lora_jax.split(wrapped)[0]))
