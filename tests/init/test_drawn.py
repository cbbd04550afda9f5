"""Initialisers that draw: their distributions."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.init.initializers import SHAPES, as_matrices, initialised, wrapped_kernel


@pytest.mark.parametrize(
    ("shape", "axes", "inputs"),
    [
        ((400, 90), ("in", "out"), 400),
        ((90, 400), ("out", "in"), 400),
        ((20, 30, 90), ("in", "in", "out"), 600),
        ((3, 200, 90), ("batch", "in", "out"), 200),
    ],
)
def test_the_default_is_uniform_within_one_over_root_in(
    shape: tuple[int, ...], axes: tuple[str, ...], inputs: int
) -> None:
    weight = wrapped_kernel(shape, rank=16, axes={"kernel": axes})
    bound = inputs**-0.5
    scaled = np.asarray(weight.lora_A).ravel() / bound
    assert np.abs(scaled).max() <= 1
    # A uniform distribution has this deviation, and comes near its bounds on both sides.
    assert np.std(scaled) == pytest.approx(3**-0.5, rel=0.03)
    assert scaled.min() < -0.99
    assert scaled.max() > 0.99
    assert not np.any(np.asarray(weight.lora_B))


@pytest.mark.parametrize(("sigma", "expected"), [(None, 1 / 8), (1.0, 1.0), (0.02, 0.02)])
def test_gaussian(sigma: float | None, expected: float) -> None:
    init = functools.partial(lora_jax.init.gaussian, standard_deviation=sigma)
    weight = wrapped_kernel((500, 40), rank=8, init=init)
    assert np.std(np.asarray(weight.lora_A)) == pytest.approx(expected, rel=0.05)
    assert np.abs(np.mean(np.asarray(weight.lora_A))) < 0.1 * expected
    assert not np.any(np.asarray(weight.lora_B))


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_orthogonal_columns_are_orthonormal(shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
    _, A, B = as_matrices(initialised("orthogonal", jnp.ones(shape), axes))
    assert_agree(A.mT @ A, np.broadcast_to(np.eye(3), (len(A), 3, 3)))
    assert not B.any()
    if len(A) > 1:
        assert abs(A[0] - A[1]).max() > 0.1
