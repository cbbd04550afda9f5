"""Flax's own training loops over wrapped parameters: the loss falls and nothing frozen moves."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import lora_jax
from tests.models.linen import CNN, MLP, noise

STEPS = 12


@pytest.fixture(autouse=True)
def standard_promotion() -> Any:
    """Optax's Adam raises a float to the power of its integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def squared_error(prediction: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean((prediction - jnp.sin(x.reshape(x.shape[0], -1)[:, :24])) ** 2)


def frozen_bits(wrapped: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(lora_jax.split(wrapped)[1])]


def assert_trained(losses: list[float], before: Any, after: Any) -> None:
    assert losses[-1] < 0.9 * losses[0]
    assert frozen_bits(after) == frozen_bits(before)
    assert all_moved(lora_jax.split(before)[0], lora_jax.split(after)[0])


def all_moved(before: Any, after: Any) -> bool:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return all(np.any(np.asarray(old) != np.asarray(new)) for old, new in pairs)


def adapted_params(fn: Callable[..., Any], params: Any, *args: Any) -> Any:
    axes = lora_jax.infer_axes(fn, params, *args)
    return lora_jax.wrap(params, "all-linear", rank=2, axes=axes)


def test_train_state_of_a_linen_model() -> None:
    module, x = MLP((32, 28, 24)), noise(16, 24)
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    wrapped = adapted_params(lambda params, x: module.apply({"params": params}, x), params, x)
    state = TrainState.create(
        apply_fn=lora_jax.adapt(module.apply),
        params=wrapped,
        tx=lora_jax.optimizer(optax.adam(1e-2)),
    )

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return squared_error(state.apply_fn({"params": params}, x), x)

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for _ in range(STEPS):
        state, value = step(state)
        losses.append(float(value))
    assert_trained(losses, wrapped, state.params)


def test_train_state_with_batch_statistics() -> None:
    class State(TrainState):
        batch_stats: Any

    module, x = CNN(), noise(8, 8, 8, 8)
    variables = jax.jit(module.init, static_argnames="train")(jax.random.key(0), x, train=True)
    stats = variables["batch_stats"]

    def apply(params: Any, stats: Any, x: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": stats}
        return module.apply(variables, x, train=True, mutable=["batch_stats"])

    wrapped = lora_jax.wrap(
        variables["params"],
        "Conv_.*",
        rank=2,
        axes=lora_jax.infer_axes(apply, variables["params"], stats, x),
    )
    state = State.create(
        apply_fn=lora_jax.adapt(apply),
        params=wrapped,
        tx=lora_jax.optimizer(optax.adam(1e-2)),
        batch_stats=stats,
    )

    @jax.jit
    def step(state: State) -> tuple[State, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            y, updates = state.apply_fn(params, state.batch_stats, x)
            return squared_error(y, x), updates

        (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        state = state.apply_gradients(grads=gradients, batch_stats=updates["batch_stats"])
        return state, value

    losses = []
    for _ in range(STEPS):
        state, value = step(state)
        losses.append(float(value))
    assert_trained(losses, wrapped, state.params)
    assert all_moved(stats, state.batch_stats)


class Regression(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(24, 32, rngs=rngs)
        self.head = nnx.Linear(32, 24, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.layer(x)))


def nnx_regression(x: jax.Array, **options: Any) -> tuple[Any, Any, Any]:
    """Returns a module's graph, the adapted function of its parameters, and these wrapped."""
    graphdef, params = nnx.split(Regression(nnx.Rngs(0)), nnx.Param)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(x)

    wrapped = lora_jax.wrap(params, "kernel", rank=2, **options)
    return graphdef, lora_jax.adapt(apply), wrapped


NNX_TRANSFORMATIONS = {
    "adam": lambda: optax.adam(3e-2),
    "lora_plus": lambda: optax.chain(optax.adam(1e-2), lora_jax.updates.lora_plus(4.0)),
    "lora_fa": lambda: lora_jax.updates.lora_fa(optax.sgd(3e-1, momentum=0.9)),
    "each label": lambda: {
        label: optax.adam(3e-2) for label in ("lora_A", "lora_B", "magnitude", "full")
    },
}


@pytest.mark.parametrize("make", NNX_TRANSFORMATIONS.values(), ids=NNX_TRANSFORMATIONS)
def test_nnx_optimizer(make: Callable[[], Any]) -> None:
    """The module's parameters hold the wrapped weights."""
    x = noise(16, 24)
    graphdef, adapted, wrapped = nnx_regression(x, dora=True, train="head/bias")
    module = nnx.merge(graphdef, wrapped, copy=True)
    optimizer = nnx.Optimizer(module, lora_jax.optimizer(make()), wrt=nnx.Param)

    @nnx.jit
    def step(module: nnx.Module, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(module: nnx.Module) -> jax.Array:
            return squared_error(adapted(nnx.state(module, nnx.Param), x), x)

        value, gradients = nnx.value_and_grad(loss)(module)
        optimizer.update(module, gradients)
        return value

    losses = [float(step(module, optimizer)) for _ in range(STEPS)]
    after = nnx.state(module, nnx.Param)
    assert jax.tree.structure(after) == jax.tree.structure(wrapped)
    assert losses[-1] < 0.9 * losses[0]
    assert frozen_bits(after) == frozen_bits(wrapped)
    assert after["layer"]["kernel"].get_value().lora_B.any()


def test_nnx_optimizer_steps_as_optax_does() -> None:
    x = noise(16, 24)
    graphdef, _, wrapped = nnx_regression(x)
    tx = lora_jax.optimizer(optax.adam(1e-2))
    module = nnx.merge(graphdef, wrapped, copy=True)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    trained, state = wrapped, tx.init(wrapped)
    gradients = jax.tree.map(jnp.ones_like, wrapped)
    for _ in range(3):
        optimizer.update(module, gradients)
        updates, state = tx.update(gradients, state, trained)
        trained = optax.apply_updates(trained, updates)
    after = jax.tree.leaves(nnx.state(module, nnx.Param))
    for found, expected in zip(after, jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_optax_on_the_parameters_of_an_nnx_module() -> None:
    """The tree is whole, so that a transformation finds both factors of a weight."""
    x = noise(16, 24)
    _, adapted, wrapped = nnx_regression(x)
    tx = lora_jax.optimizer(optax.chain(lora_jax.updates.riemannian(), optax.adam(3e-2)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(lambda tree: squared_error(adapted(tree, x), x))(
            trained
        )
        updates, state = tx.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    trained, state, losses = jax.tree.map(jnp.copy, wrapped), tx.init(wrapped), []
    for _ in range(STEPS):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert_trained(losses, wrapped, trained)
