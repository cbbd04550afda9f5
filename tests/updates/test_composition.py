"""Every method beside what else an optimiser is made of."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import lora_jax
from tests.arrays import random
from tests.updates.forms import (
    FEW,
    Half,
    Masked,
    Whole,
    check,
    each_trainable_form,
    each_variant,
    eager,
    gradients_of,
    jitted,
)
from tests.updates.reference import (
    DECAY,
    RATE,
    Adamw,
    Sgd,
    Variant,
    gradients_like,
    wrapped_params,
)


@pytest.mark.usefixtures("float64")
@each_trainable_form
@each_variant
def test_a_schedule(variant: Variant, form: Any) -> None:
    wrapped = wrapped_params(FEW)
    gradients = gradients_of(wrapped, steps=3)
    schedule = optax.linear_schedule(RATE, 0.0, 4)
    after = eager(
        form(variant.around(optax.adamw(schedule, weight_decay=DECAY))), wrapped, gradients
    )
    check(variant, lambda: Adamw(lambda step: RATE * (1 - step / 4)), wrapped, gradients, after)


@pytest.mark.usefixtures("float64")
@each_trainable_form
@each_variant
def test_injected_hyperparameters(variant: Variant, form: Any) -> None:
    wrapped = wrapped_params(FEW)
    gradients = gradients_of(wrapped, steps=2)
    inner = optax.inject_hyperparams(optax.adamw)(learning_rate=RATE, weight_decay=DECAY)
    after = eager(form(variant.around(inner)), wrapped, gradients)
    check(variant, Adamw, wrapped, gradients, after)


ACCUMULATED: dict[str, Callable[[Variant], Whole]] = {
    "inside": lambda v: Masked(optax.MultiSteps(v.around(optax.sgd(RATE)), 2)),
    "inside, as a transformation": lambda v: Masked(
        optax.MultiSteps(v.around(optax.sgd(RATE)), 2).gradient_transformation()
    ),
    "outside": lambda v: Whole(optax.MultiSteps(lora_jax.optimizer(v.around(optax.sgd(RATE))), 2)),
    "half": lambda v: Half(optax.MultiSteps(v.around(optax.sgd(RATE)), 2)),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", ACCUMULATED.values(), ids=ACCUMULATED)
@each_variant
def test_accumulated_gradients(variant: Variant, make: Callable[[Variant], Whole]) -> None:
    wrapped = wrapped_params(FEW)
    gradients = gradients_of(wrapped, steps=4)
    means = [
        jax.tree.map(lambda x, y: (x + y) / 2, *gradients[first : first + 2]) for first in (0, 2)
    ]
    check(variant, Sgd, wrapped, means, jitted(make(variant), wrapped, gradients))


@each_variant
def test_clipping_before_the_inner_transformation(variant: Variant) -> None:
    wrapped = wrapped_params(FEW, dtype=jnp.float32)
    inner = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    tx = lora_jax.optimizer(variant.around(inner))
    updates, _ = tx.update(gradients_like(wrapped, seed=2), tx.init(wrapped), wrapped)
    nodes = [updates[name]["kernel"] for name in FEW]
    rates = [rate or 1.0 for rate in variant.rates]
    clipped = [[node.lora_A / rates[0], node.lora_B / rates[1]] for node in nodes]
    norm = optax.tree.norm([clipped, updates["head"]["bias"].value])
    np.testing.assert_allclose(norm, 1e-3, rtol=1e-5)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


@each_variant
def test_a_flax_train_state(variant: Variant) -> None:
    x, y = (random(16, size, seed=seed) for seed, size in ((0, 8), (1, 3)))
    network = Mlp()
    wrapped = lora_jax.wrap(network.init(jax.random.key(2), x)["params"], "kernel", rank=2)
    inner = optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(5e-3))
    state = TrainState.create(
        apply_fn=lora_jax.adapt(network.apply),
        params=wrapped,
        tx=lora_jax.optimizer(variant.around(inner)),
    )

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for _ in range(20):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.95 * losses[0]
