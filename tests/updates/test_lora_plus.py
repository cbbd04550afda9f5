"""LoRA+ by itself; what all methods share is in test_variants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax.updates import lora_plus
from tests.updates.forms import FEW
from tests.updates.reference import wrapped_params


def test_only_lora_b_is_multiplied() -> None:
    wrapped = wrapped_params(FEW, dtype=jnp.float32)
    updates, _ = lora_plus(3.0).update(jax.tree.map(jnp.ones_like, wrapped), optax.EmptyState())
    jax.tree.map(
        lambda label, update: np.testing.assert_array_equal(update, 3 if label == "lora_B" else 1),
        lora_jax.labels(wrapped),
        updates,
    )


def test_a_ratio_that_a_schedule_gives() -> None:
    adapters, _ = lora_jax.split(wrapped_params(FEW, dtype=jnp.float32))
    tx = optax.inject_hyperparams(lora_plus)(ratio=lambda count: 2.0 + count)
    state = tx.init(adapters)
    update = jax.jit(tx.update)
    for ratio in (2, 3, 4):
        updates, state = update(jax.tree.map(jnp.ones_like, adapters), state, adapters)
        np.testing.assert_array_equal(updates["dense"]["kernel"].lora_A, 1)
        np.testing.assert_array_equal(updates["dense"]["kernel"].lora_B, ratio)


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_the_rate_of_b_is_the_ratio_times_that_of_a(rate: float) -> None:
    """Adam's first step is the learning rate for every entry."""
    wrapped = wrapped_params(FEW, dtype=jnp.float32)
    tx = lora_jax.optimizer(optax.chain(optax.adam(rate), lora_plus(8.0)))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, wrapped), tx.init(wrapped), wrapped)
    np.testing.assert_allclose(updates["dense"]["kernel"].lora_A, -rate, rtol=1e-5)
    np.testing.assert_allclose(updates["dense"]["kernel"].lora_B, -8 * rate, rtol=1e-5)
