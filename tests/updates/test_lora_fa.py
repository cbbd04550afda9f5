"""LoRA-FA by itself; what all methods share is in test_variants."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax.updates import lora_fa
from tests.agreement import assert_agree
from tests.updates.forms import FEW, Half, Masked, Whole, eager, gradients_of, stack
from tests.updates.reference import gradients_like, wrapped_params

INNER = {
    "weight decay": optax.adamw(0.1, weight_decay=0.5),
    "noise": optax.chain(optax.add_noise(1.0, 0.5, key=0), optax.sgd(0.1)),
    "sign": optax.sign_sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "accumulation": optax.MultiSteps(optax.adamw(0.1), 2),
    "optimizer": lora_jax.optimizer(optax.adamw(0.1)),
}


@pytest.mark.parametrize("form", [Whole, Masked, Half], ids=["whole", "masked", "half"])
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_lora_a_keeps_its_bits_whatever_is_inside(inner: Any, form: Any) -> None:
    wrapped = wrapped_params(FEW, dtype=jnp.float32)
    after = eager(form(lora_fa(inner)), wrapped, gradients_of(wrapped, steps=2))
    for name in FEW:
        before_node, after_node = wrapped[name]["kernel"], after[name]["kernel"]
        np.testing.assert_array_equal(after_node.lora_A, before_node.lora_A)
        assert not (after_node.lora_B == before_node.lora_B).all()


@pytest.mark.parametrize("form", [Masked, Half], ids=["masked", "half"])
def test_no_state_for_lora_a(form: Any) -> None:
    wrapped = wrapped_params(FEW, dtype=jnp.float32)
    state = form(lora_fa(optax.adam(0.1))).init(wrapped)
    trained = [wrapped[name]["kernel"].lora_B for name in FEW] + [wrapped["head"]["bias"].value]
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in trained)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_a_step_moves_the_weight_along_its_projected_gradient(alpha: float) -> None:
    generator = np.random.default_rng(0)
    W, A, B, gradient = (
        jnp.asarray(generator.normal(size=size)) for size in ((8, 5), (8, 3), (3, 5), (8, 5))
    )
    weight = lora_jax.LoRAWeight(W, A, B, jnp.asarray(alpha / 3), ("in", "out"))
    scale = alpha / 3
    gradients = lora_jax.LoRAWeight(
        jnp.zeros_like(W), scale * gradient @ B.T, scale * A.T @ gradient, 0.0, ("in", "out")
    )
    tx = lora_fa(optax.sgd(1.0))
    updates, _ = tx.update(gradients, tx.init(weight), weight)
    projection = A @ np.linalg.pinv(A)
    assert_agree(scale * A @ updates.lora_B, -projection @ gradient)


def test_stacked_adapters_over_one_base() -> None:
    """The scale isn't stacked where only the trainable half is."""
    wrapped = wrapped_params(FEW, dtype=jnp.float32)
    adapters, frozen = lora_jax.split(wrapped)
    others = lora_jax.split(gradients_like(wrapped, seed=3))[0]
    gradients = lora_jax.split(gradients_like(wrapped, seed=4))[0]
    tx = lora_fa(optax.sgd(1.0))

    def updates_of(adapters: Any, gradients: Any) -> Any:
        whole = lora_jax.combine(adapters, frozen)
        return tx.update(gradients, tx.init(adapters), adapters, wrapped=whole)[0]

    together = jax.vmap(updates_of)(stack([adapters, others]), stack([gradients, gradients]))
    alone = updates_of(others, gradients)
    for name in FEW:
        assert_agree(
            together[name]["kernel"].lora_B[1], alone[name]["kernel"].lora_B, tolerance=1e-4
        )


@pytest.mark.parametrize("inputs", [4, 300])
def test_a_lora_a_without_full_rank_gives_no_overflow(inputs: int) -> None:
    """What rounding makes of directions that aren't there stays of the size of the others."""
    generator = np.random.default_rng(0)
    A = generator.normal(size=(inputs, 2)) @ generator.normal(size=(2, 4))
    dense_gradient = generator.normal(size=(inputs, 5))
    weight = lora_jax.LoRAWeight(
        jnp.zeros((inputs, 5)),
        jnp.asarray(A, jnp.float32),
        jnp.zeros((4, 5)),
        jnp.ones(()),
        ("in", "out"),
    )
    gradients = jax.tree.map(jnp.zeros_like, weight)
    lora_B = jnp.asarray(A.T @ dense_gradient, jnp.float32)
    gradients = lora_jax.LoRAWeight(
        gradients.base, gradients.lora_A, lora_B, gradients.scale, ("in", "out")
    )
    tx = lora_fa(optax.sgd(1.0))
    updates, _ = tx.update(gradients, tx.init(weight), weight)
    expected = -np.linalg.pinv(A) @ dense_gradient
    assert np.abs(updates.lora_B - expected).max() < 0.5 * np.abs(expected).max()


def test_the_scale_that_a_half_does_not_hold_is_asked_for() -> None:
    adapters, frozen = lora_jax.split(wrapped_params(FEW, dtype=jnp.float32))
    tx = optax.chain(optax.clip_by_global_norm(1.0), lora_fa(optax.adam(1e-3)))
    state = tx.init(adapters)
    message = (
        r"`lora_fa` needs scale of 'dense/kernel'.*as `wrapped`: tx.update\(gradients, state, "
        r"adapters, wrapped=lora_jax.combine\(adapters, frozen\)\)"
    )
    with pytest.raises(ValueError, match=message):
        tx.update(adapters, state, adapters)
    tx.update(adapters, state, adapters, wrapped=lora_jax.combine(adapters, frozen))


@pytest.mark.wrong_types
@pytest.mark.parametrize("tx", [None, 1e-3, "adam", optax.adam])
def test_what_is_no_transformation_raises(tx: Any) -> None:
    with pytest.raises(TypeError, match="`tx` is .*; expected an optax transformation"):
        lora_fa(tx)
