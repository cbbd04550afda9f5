"""The optimiser for wrapped trees; what optax offers to put into it is in optimizers/test_optax."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import lora_jax
from tests.agreement import assert_agree
from tests.arrays import random

FROZEN = "frozen"


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """Optax raises a rate to the power of an integer count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


PARAMS = {
    "first": {"kernel": random(8, 8), "bias": random(8, seed=1)},
    "second": {"kernel": random(8, 3, seed=2), "bias": random(3, seed=3)},
}
X, Y = random(16, 8, seed=4), random(16, 3, seed=5)


def model(params: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return h @ params["second"]["kernel"] + params["second"]["bias"][None]


def loss(wrapped: Any) -> jax.Array:
    return jnp.mean((lora_jax.adapt(model)(wrapped, X) - Y) ** 2)


def wrapped_params(**options: Any) -> Any:
    return lora_jax.wrap(PARAMS, "kernel", rank=2, train="second/bias", **options)


def trained(tx: optax.GradientTransformation, wrapped: Any, steps: int = 3) -> tuple[Any, Any]:
    @jax.jit
    def step(wrapped: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(wrapped), state, wrapped)
        return optax.apply_updates(wrapped, updates), state

    state = tx.init(wrapped)
    for _ in range(steps):
        wrapped, state = step(wrapped, state)
    return wrapped, state


def same_bits(a: Any, b: Any) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def changed(before: Any, after: Any) -> set[str]:
    """Returns the labels of the leaves that are not what they were."""
    different = jax.tree.map(lambda a, b: not same_bits(a, b), before, after)
    pairs = zip(jax.tree.leaves(lora_jax.labels(before)), jax.tree.leaves(different), strict=True)
    return {label for label, is_different in pairs if is_different}


def schedule() -> Any:
    return optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 2, 10)


def multi_steps() -> Any:
    return optax.MultiSteps(optax.sgd(1e-1), 2).gradient_transformation()


TRANSFORMATIONS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optax.sgd(1e-1),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "schedule": lambda: optax.adam(schedule()),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=1e-1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0)),
    "MultiSteps": multi_steps,
}


@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_adapters_train_and_frozen_bits_stay(make: Callable[[], Any]) -> None:
    wrapped = wrapped_params()
    after, _ = trained(lora_jax.optimizer(make()), wrapped, steps=4)
    assert changed(wrapped, after) == {"lora_A", "lora_B", "full"}
    assert loss(after) < loss(wrapped)


def test_the_whole_transformation_in_multi_steps() -> None:
    wrapped = wrapped_params()
    tx = optax.MultiSteps(lora_jax.optimizer(optax.sgd(1e-1)), 2).gradient_transformation()
    assert changed(wrapped, trained(tx, wrapped, steps=1)[0]) == set()
    assert changed(wrapped, trained(tx, wrapped, steps=4)[0]) == {"lora_A", "lora_B", "full"}


def array_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree) if x.ndim)


def test_the_state_is_for_what_trains() -> None:
    wrapped = wrapped_params()
    state = lora_jax.optimizer(optax.adam(1e-3)).init(wrapped)
    assert array_bytes(state) == 2 * lora_jax.count_parameters(wrapped).trainable_bytes


@pytest.mark.parametrize(
    "tx", [optax.adam(1e-3), {"lora_A": optax.adam(1e-3)}, {}], ids=["one", "mapping", "none"]
)
def test_a_tree_in_which_nothing_trains_raises(tx: Any) -> None:
    with pytest.raises(ValueError, match="nothing trains.*not with plain params"):
        lora_jax.optimizer(tx).init(PARAMS)


def test_each_label_may_have_a_rate_of_its_own() -> None:
    wrapped = wrapped_params(init="gaussian")
    tx = lora_jax.optimizer({"lora_A": optax.sgd(1.0), "lora_B": optax.sgd(16.0)})
    gradients = jax.tree.map(jnp.ones_like, wrapped)
    updates, _ = tx.update(gradients, tx.init(wrapped), wrapped)
    expected = {"lora_A": -1.0, "lora_B": -16.0, "full": 0.0, FROZEN: 0.0}
    jax.tree.map(
        lambda label, update: np.testing.assert_array_equal(update, expected[label]),
        lora_jax.labels(wrapped),
        updates,
    )
    # No state for what the mapping leaves out.
    assert array_bytes(lora_jax.optimizer({"lora_A": optax.adam(1.0)}).init(wrapped)) == sum(
        2 * wrapped[layer]["kernel"].lora_A.nbytes for layer in ("first", "second")
    )


@pytest.mark.parametrize("label", [FROZEN, "lora_C", "trainable", "base"])
def test_an_unknown_label_raises(label: str) -> None:
    with pytest.raises(ValueError, match=f"`tx` has the labels '{label}'; expected 'lora_A'"):
        lora_jax.optimizer({"lora_A": optax.sgd(1.0), label: optax.sgd(1.0)})


@pytest.mark.wrong_types
@pytest.mark.parametrize("tx", [1e-3, None, "adam"])
def test_what_is_no_transformation_raises(tx: Any) -> None:
    with pytest.raises(TypeError, match="`tx` is"):
        lora_jax.optimizer(tx)


def test_a_global_norm_is_over_all_that_trains_and_nothing_else() -> None:
    wrapped = wrapped_params()
    tx = lora_jax.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    gradients = jax.tree.map(lambda x: 10 * jnp.ones_like(x), wrapped)
    updates, _ = tx.update(gradients, tx.init(wrapped), wrapped)
    count = lora_jax.count_parameters(wrapped).trainable
    for update in jax.tree.leaves(lora_jax.split(updates)[0]):
        assert_agree(update, np.full(update.shape, -1 / np.sqrt(count)))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


def test_a_flax_train_state() -> None:
    network = Mlp()
    params = network.init(jax.random.key(2), X)["params"]
    wrapped = lora_jax.wrap(params, "kernel", rank=2)
    state = TrainState.create(
        apply_fn=lora_jax.adapt(network.apply),
        params=wrapped,
        tx=lora_jax.optimizer(optax.adam(1e-2)),
    )

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        def loss_of(params: Any) -> jax.Array:
            return jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)

        value, gradients = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for _ in range(20):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.95 * losses[0]
    assert changed(wrapped, state.params) == {"lora_A", "lora_B"}
    assert int(state.step) == 20


def test_any_optimiser_on_the_adapters_alone() -> None:
    """With `split`, a transformation that knows nothing of adapters is safe."""
    adapters, frozen = lora_jax.split(wrapped_params())
    tx = optax.adamw(1e-2, weight_decay=1.0)
    gradients = jax.grad(lambda a: loss(lora_jax.combine(a, frozen)))(adapters)
    updates, _ = tx.update(gradients, tx.init(adapters), adapters)
    after = lora_jax.combine(optax.apply_updates(adapters, updates), frozen)
    assert changed(wrapped_params(), after) <= {"lora_A", "lora_B", "full"}


# --- every bit of what is frozen ---------------------------------------------------------------

# Numbers that adding a zero may change: -0.0 + 0.0 is 0.0, and some processors round the smallest
# numbers to zero.
DELICATE = np.array([-0.0, 0.0, 1e-40, np.inf, np.nan, 1.0], np.float32)


def delicate_params() -> Any:
    values = {
        "float32": jnp.asarray(DELICATE),
        "bfloat16": jnp.asarray(DELICATE, jnp.bfloat16),
        "float16": jnp.asarray(DELICATE, jnp.float16),
        "complex": jax.lax.complex(jnp.asarray(DELICATE), -jnp.asarray(DELICATE)),
        "integers": jnp.arange(-2, 3),
        "codes": jnp.arange(3, dtype=jnp.uint8),
        "mask": jnp.array([True, False]),
        "none": None,
    }
    return lora_jax.wrap({"kernel": random(4, 3), **values}, "kernel", rank=2)


def delicate_loss(wrapped: Any) -> jax.Array:
    return jnp.sum(lora_jax.adapt(jnp.dot)(jnp.ones((2, 4)), wrapped["kernel"]) ** 2)


def delicate_step(tx: Any, wrapped: Any, state: Any) -> tuple[Any, Any]:
    gradients = jax.grad(delicate_loss, allow_int=True)(wrapped)
    updates, state = tx.update(gradients, state, wrapped)
    return optax.apply_updates(wrapped, updates), state


TX = lora_jax.optimizer(optax.adam(1e-1))


@pytest.mark.usefixtures("optimised")
def test_a_compiled_step_keeps_every_bit() -> None:
    wrapped = delicate_params()
    state = TX.init(wrapped)
    after, _ = jax.jit(functools.partial(delicate_step, TX))(wrapped, state)
    assert changed(wrapped, after) == {"lora_B"}


@pytest.mark.parametrize("give_params", [True, False], ids=["params", "no params"])
def test_leaves_without_a_gradient_get_nothing_to_add(give_params: bool) -> None:
    """The gradient of integers and keys is of the dtype float0, to which nothing can be added."""
    leaves = {"keys": jax.random.split(jax.random.key(1), 3), "steps": jnp.arange(3), "size": 3}
    wrapped = lora_jax.wrap({"kernel": random(4, 3), **leaves}, "kernel", rank=2)

    @jax.jit
    def step(wrapped: Any, state: Any) -> tuple[Any, Any]:
        gradients = jax.grad(delicate_loss, allow_int=True)(wrapped)
        updates, state = TX.update(gradients, state, wrapped if give_params else None)
        return optax.apply_updates(wrapped, updates), state

    after, _ = step(wrapped, TX.init(wrapped))
    assert jax.tree.structure(after) == jax.tree.structure(wrapped)
    assert after["kernel"].lora_B.any()
    for name in leaves:
        np.testing.assert_array_equal(numbers(after[name]), numbers(wrapped[name]))


def numbers(leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def test_gradients_with_none_for_what_has_none() -> None:
    """As Equinox gives them, whose `apply_updates` passes over None."""
    wrapped = lora_jax.wrap({"kernel": random(4, 3), "steps": jnp.arange(3)}, "kernel", rank=2)
    gradients = eqx.filter_grad(delicate_loss)(wrapped)
    assert gradients["steps"] is None
    updates, _ = TX.update(gradients, TX.init(wrapped), wrapped)
    after = eqx.apply_updates(wrapped, updates)
    assert changed(wrapped, after) == {"lora_B"}


def test_a_weight_in_the_memory_of_the_host_stays_there() -> None:
    """Nothing is added to it: a device computes with what is in its own memory."""
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    node = lora_jax.wrap({"kernel": random(4, 3)}, "kernel", rank=2)["kernel"]
    wrapped = {"kernel": dataclasses.replace(node, base=jax.device_put(node.base, host))}

    def fetched(params: Any) -> jax.Array:
        kernel = jax.device_put(params["kernel"], jax.memory.Space.Device)
        return jnp.ones((2, 4)) @ kernel

    @functools.partial(jax.jit, donate_argnums=0)
    def step(wrapped: Any, state: Any) -> tuple[Any, Any]:
        gradients = jax.grad(lambda tree: jnp.sum(lora_jax.adapt(fetched)(tree) ** 2))(wrapped)
        updates, state = TX.update(gradients, state, wrapped)
        return optax.apply_updates(wrapped, updates), state

    after, _ = step(wrapped, TX.init(wrapped))
    assert after["kernel"].base.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(after["kernel"].base, random(4, 3))
    assert after["kernel"].lora_B.any()


# --- what a step copies ------------------------------------------------------------------------


@pytest.mark.usefixtures("optimised")
def test_a_donated_tree_is_not_copied() -> None:
    # JAX can't donate an array that may share its memory with NumPy.
    kernel = jax.jit(jnp.copy)(random(128, 128))
    wrapped = lora_jax.wrap({"kernel": kernel}, "kernel", rank=2)
    state = TX.init(wrapped)
    pointer = wrapped["kernel"].base.unsafe_buffer_pointer()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(wrapped: Any, state: Any) -> tuple[Any, Any]:
        x = jnp.ones((2, 128))
        gradients = jax.grad(
            lambda wrapped: jnp.sum(lora_jax.adapt(jnp.dot)(x, wrapped["kernel"]) ** 2)
        )(wrapped)
        updates, state = TX.update(gradients, state, wrapped)
        return optax.apply_updates(wrapped, updates), state

    memory: Any = step.lower(wrapped, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= wrapped["kernel"].base.nbytes
    assert memory.temp_size_in_bytes < wrapped["kernel"].base.nbytes
    after, _ = step(wrapped, state)
    assert after["kernel"].base.unsafe_buffer_pointer() == pointer


# --- forms of the tree -------------------------------------------------------------------------


@pytest.mark.parametrize("tx", [optax.adam(0.1), {"lora_B": optax.adam(0.1)}], ids=["one", "label"])
def test_the_half_has_the_state_and_the_updates_of_the_whole(tx: Any) -> None:
    wrapped = wrapped_params(init="gaussian")
    adapters, _ = lora_jax.split(wrapped)
    tx = lora_jax.optimizer(tx)
    gradients = jax.tree.map(jnp.ones_like, wrapped)
    updates, state = tx.update(gradients, tx.init(wrapped), wrapped)
    half_updates, half_state = tx.update(lora_jax.split(gradients)[0], tx.init(adapters), adapters)
    assert_agree(lora_jax.split(updates)[0], half_updates, tolerance=0)
    assert_agree(state, half_state, tolerance=0)


def test_extra_arguments_by_name_reach_a_transformation_that_takes_only_these() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, factor: float) -> Any:
        return jax.tree.map(lambda x: factor * x, updates), state

    tx = lora_jax.optimizer(optax.GradientTransformation(optax.init_empty_state, update))
    wrapped = wrapped_params()
    gradients = jax.tree.map(jnp.ones_like, wrapped)
    updates, _ = tx.update(gradients, tx.init(wrapped), wrapped, factor=3.0, other=None)
    np.testing.assert_array_equal(updates["first"]["kernel"].lora_B, 3.0)
