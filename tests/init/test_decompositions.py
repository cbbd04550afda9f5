"""Initialisers that decompose the weight, alone or with its inputs, beside NumPy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax._shapes import to_matrices
from tests.agreement import assert_agree
from tests.arrays import random
from tests.init.initializers import (
    KEY,
    SHAPES,
    as_matrices,
    initialised,
    seen_inputs,
    wrapped_kernel,
)


# What each decomposition is by its definition: W, rank, scale and inputs to A, B. Signs are free.
def pissa_by_definition(
    W: np.ndarray, rank: int, scale: float, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    root = np.diag(np.sqrt(S[:rank] / scale))
    return U[:, :rank] @ root, root @ Vt[:rank]


def olora_by_definition(
    W: np.ndarray, rank: int, scale: float, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    Q, R = np.linalg.qr(W.T)
    return R[:rank].T, Q[:, :rank].T


def corda_by_definition(
    W: np.ndarray, rank: int, scale: float, rows: np.ndarray, chosen: slice
) -> tuple[np.ndarray, np.ndarray]:
    C = rows.T @ rows
    C = C / np.mean(np.diag(C)) + 0.01 * np.eye(len(C))
    U, S, Vt = np.linalg.svd(W.T @ C, full_matrices=False)
    root = np.diag(np.sqrt(S[chosen] / scale))
    return np.linalg.inv(C) @ Vt[chosen].T @ root, root @ U[:, chosen].T


DEFINITIONS: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "corda ipm": functools.partial(corda_by_definition, chosen=slice(None, 3)),
    "corda kpm": functools.partial(corda_by_definition, chosen=slice(-3, None)),
    "olora": olora_by_definition,
    "pissa": pissa_by_definition,
}


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_decompositions_are_those_of_their_definition(
    name: str, shape: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    leaf = random(*shape)
    weight = initialised(name, leaf, axes)
    matrices = np.asarray(to_matrices(leaf, axes), np.float64)
    for W, rows, base, A, B in zip(
        matrices, seen_inputs(matrices), *as_matrices(weight), strict=True
    ):
        expected_A, expected_B = DEFINITIONS[name](W, 3, 0.5, rows)
        assert_agree(A @ B, expected_A @ expected_B, tolerance=2e-4)
        assert_agree(abs(A), abs(expected_A), tolerance=5e-4)
        assert_agree(abs(B), abs(expected_B), tolerance=5e-4)
        assert_agree(base, W - 0.5 * expected_A @ expected_B, tolerance=2e-4)


@pytest.mark.parametrize("decay", [0.5, 0.8])
@pytest.mark.parametrize("shape", [(80, 50), (50, 80)])
def test_the_randomised_decomposition_is_close_where_the_spectrum_decays(
    shape: tuple[int, int], decay: float
) -> None:
    U, V = (np.linalg.qr(np.random.default_rng(side).normal(size=(side, 50)))[0] for side in shape)
    leaf = jnp.asarray(U * decay ** np.arange(50) @ V.T, jnp.float32)
    exact, fast = (
        lora_jax.wrap({"kernel": leaf}, "kernel", rank=8, init=init)["kernel"]
        for init in ("pissa", functools.partial(lora_jax.init.pissa, power_iterations=4))
    )
    assert_agree(fast.base, exact.base, size=leaf)
    assert_agree(abs(fast.lora_A), abs(exact.lora_A), tolerance=1e-4)


def test_power_iterations_and_oversampling_sharpen_the_randomised_decomposition() -> None:
    leaf = random(80, 60)

    def distance(init: Any) -> float:
        wrapped = lora_jax.wrap({"kernel": leaf}, "kernel", rank=8, init=init)
        return float(jnp.linalg.norm(wrapped["kernel"].base))

    def randomised(**options: int) -> float:
        return distance(functools.partial(lora_jax.init.pissa, **options))

    best = distance("pissa")
    none, some, many = (randomised(power_iterations=count) for count in (0, 2, 10))
    assert best <= many < some < none < randomised(power_iterations=0, oversampling=0)
    assert many == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("option", ["power_iterations", "oversampling"])
def test_negative_options_of_the_randomised_decomposition_raise(option: str) -> None:
    options = {"power_iterations": 2, "oversampling": 2, option: -1}
    with pytest.raises(ValueError, match=f"`{option}` is -1"):
        wrapped_kernel((4, 4), rank=2, init=functools.partial(lora_jax.init.pissa, **options))


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_mica_takes_the_outputs_that_the_weight_hardly_writes_to(
    shape: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    leaf = random(*shape)
    _, A, B = as_matrices(initialised("mica", leaf, axes))
    assert not A.any()
    for W, minor in zip(np.asarray(to_matrices(leaf, axes), np.float64), B, strict=True):
        # Torch's weight is the transpose, and its left vectors are the outputs.
        U, S, _ = np.linalg.svd(W.T, full_matrices=False)
        assert_agree(abs(minor), abs(U[:, -3:].T), tolerance=1e-4)
        assert_agree(np.linalg.norm(W @ minor.T, axis=0), S[-3:])


def test_mica_says_that_lora_b_does_not_train() -> None:
    weight = random(6, 5)
    base, lora_A, lora_B = lora_jax.init.mica(KEY, weight, 2, 1.0)
    assert base is weight
    assert isinstance(lora_B, lora_jax.init.Frozen)
    assert not isinstance(lora_A, lora_jax.init.Frozen)
    assert [leaf.shape for leaf in jax.tree.leaves(lora_B)] == [(2, 5)]


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_bfloat16_factors_lose_nothing_of_the_weight(name: str) -> None:
    """The base is what the rounded factors leave."""
    params = {"kernel": random(12, 10)}
    wrapped = lora_jax.wrap(params, "kernel", rank=3, alpha=5, dtype=jnp.bfloat16, init=name)
    assert wrapped["kernel"].lora_A.dtype == jnp.bfloat16
    for restored in (
        lora_jax.merge(wrapped),
        lora_jax.unwrap(wrapped),
        lora_jax.merge(lora_jax.arithmetic.on_original_base(wrapped)),
        lora_jax.unwrap(lora_jax.arithmetic.on_original_base(wrapped)),
    ):
        assert_agree(restored["kernel"], params["kernel"])
