"""Riemannian preconditioning by itself; what all methods share is in test_variants."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax.updates import riemannian
from tests.agreement import assert_agree
from tests.updates.forms import FEW
from tests.updates.reference import wrapped_params


def weight_of(A: Any, B: Any, scale: float = 2.0) -> lora_jax.LoRAWeight:
    base = jnp.zeros((A.shape[0], B.shape[1]), A.dtype)
    return lora_jax.LoRAWeight(base, A, B, jnp.asarray(scale, A.dtype), ("in", "out"))


def preconditioned(A: Any, B: Any, dense_gradient: Any, **options: Any) -> Any:
    """Returns both gradients of a weight whose dense gradient is given."""
    gradients = weight_of(2.0 * dense_gradient @ B.T, 2.0 * A.T @ dense_gradient)
    tx = riemannian(**options)
    weight = weight_of(A, B)
    updates, _ = tx.update(gradients, tx.init(weight), weight)
    return updates.lora_A, updates.lora_B


def normal(seed: int, *sizes: tuple[int, int]) -> list[jax.Array]:
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.normal(size=size)) for size in sizes]


@pytest.mark.usefixtures("float64")
def test_a_step_does_not_depend_on_how_the_product_is_split() -> None:
    A, B, gradient, Q = normal(0, (8, 3), (3, 5), (8, 5), (3, 3))
    plain = preconditioned(A, B, gradient, damping=1e-14)
    mixed = preconditioned(A @ Q, jnp.linalg.inv(Q) @ B, gradient, damping=1e-14)
    change = plain[0] @ B + A @ plain[1]
    mixed_change = mixed[0] @ jnp.linalg.inv(Q) @ B + A @ Q @ mixed[1]
    assert_agree(mixed_change, change)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", [0.0, 1e-3, 0.1, 1.0, 100.0])
def test_the_default_damping_bounds_the_gradient_of_lora_a(size: float) -> None:
    A, B, gradient = normal(1, (8, 3), (3, 5), (8, 5))
    found, _ = preconditioned(A, size * B, gradient)
    assert np.linalg.norm(found, 2) <= 2.0 * 5.0 * np.linalg.norm(gradient, 2)


@pytest.mark.parametrize("damping", [1e-2, 1e-6])
def test_lora_b_of_zeros(damping: float) -> None:
    """As it is at initialisation: lora_A's gradient is zero and stays so."""
    A, gradient = (each.astype(jnp.float32) for each in normal(2, (8, 3), (8, 5)))
    B = jnp.zeros((3, 5))
    found_A, found_B = preconditioned(A, B, gradient, damping=damping)
    np.testing.assert_array_equal(found_A, 0)
    expected = np.linalg.inv(A.T @ A + damping * np.eye(3)) @ (2.0 * A.T @ gradient)
    assert_agree(found_B, expected, tolerance=1e-4)


@pytest.mark.parametrize("damping", [1e-2, 1e-6, 1e-12])
def test_factors_without_full_rank_give_finite_gradients(damping: float) -> None:
    A, B, gradient = (each.astype(jnp.float32) for each in normal(3, (50, 1), (1, 40), (50, 40)))
    A, B = jnp.tile(A, 6), jnp.tile(B, (6, 1))
    for found in preconditioned(A, B, gradient, damping=damping):
        assert bool(jnp.isfinite(found).all())


def test_the_half_of_a_tree_needs_no_more_than_its_factors() -> None:
    adapters, _ = lora_jax.split(wrapped_params(FEW, dtype=jnp.float32))
    tx = optax.chain(riemannian(), optax.sgd(1.0))
    updates, _ = tx.update(adapters, tx.init(adapters), adapters)
    assert jax.tree.structure(updates) == jax.tree.structure(adapters)


def test_a_factor_that_a_half_does_not_hold_is_asked_for() -> None:
    weight = weight_of(*(each.astype(jnp.float32) for each in normal(4, (8, 3), (3, 5))))
    only_B = lora_jax.LoRAWeight(None, None, weight.lora_B, None, ("in", "out"))
    tx = riemannian()
    with pytest.raises(ValueError, match=r"`riemannian` needs lora_A of ''.*as `wrapped`"):
        tx.update(only_B, tx.init(only_B), only_B)
    updates, _ = tx.update(only_B, tx.init(only_B), only_B, wrapped=weight)
    assert updates.lora_A is None
