"""Initialisers: their distributions, and what one of the user's own may do."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax

KEY = jax.random.key(3)


def wrapped_kernel(shape: tuple[int, ...], **options: Any) -> lora_jax.LoRAWeight:
    params = {"kernel": jax.random.normal(KEY, shape)}
    return lora_jax.wrap(params, "kernel", key=KEY, **options)["kernel"]


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


@pytest.mark.parametrize("name", ["kaiming", "gaussian"])
def test_a_name_is_the_function(name: str) -> None:
    by_name = wrapped_kernel((20, 10), init=name)
    by_function = wrapped_kernel((20, 10), init=getattr(lora_jax.init, name))
    np.testing.assert_array_equal(by_name.lora_A, by_function.lora_A)
    assert lora_jax.init.initializer(name) is getattr(lora_jax.init, name)


def low_rank_part_taken_out(
    key: jax.Array, weight2d: jax.Array, rank: int, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The principal part becomes the adapter, and the base keeps the rest."""
    U, S, Vt = jnp.linalg.svd(weight2d, full_matrices=False)
    root = jnp.sqrt(S[:rank] / scale)
    A, B = U[:, :rank] * root, root[:, None] * Vt[:rank]
    return weight2d - scale * (A @ B), A, B


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((12, 10), ("in", "out")),
        ((4, 3, 10), ("in", "in", "out")),
        ((3, 12, 10), ("batch", "in", "out")),
        ((10, 3, 12), ("out", "batch", "in")),
    ],
)
def test_an_initialiser_may_change_the_base(shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
    params = {"kernel": jax.random.normal(KEY, shape), "other": jnp.ones((3, 3))}
    wrapped = lora_jax.wrap(
        params, "kernel", rank=2, alpha=1.0, axes={"kernel": axes}, init=low_rank_part_taken_out
    )
    np.testing.assert_allclose(lora_jax.merge(wrapped)["kernel"], params["kernel"], atol=1e-5)
    assert jnp.abs(wrapped["kernel"].base - params["kernel"]).max() > 0.1
    np.testing.assert_allclose(lora_jax.unwrap(wrapped)["kernel"], params["kernel"], atol=1e-5)
    assert wrapped["other"] is params["other"]


def test_an_initialiser_sees_matrix_rank_and_scale() -> None:
    seen = []

    def init(key: jax.Array, weight2d: jax.Array, rank: int, scale: float) -> Any:
        seen.append((weight2d.shape, rank, scale))
        return lora_jax.init.kaiming(key, weight2d, rank, scale)

    wrapped_kernel((4, 5, 6), rank=2, alpha=3, axes={"kernel": ("in", "out", "out")}, init=init)
    assert seen == [((4, 30), 2, 1.5)]


@pytest.mark.parametrize("init", ["nope", "", 3, None, []])
def test_an_unknown_name_raises(init: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="`init` is.*'gaussian', 'kaiming'"):
        wrapped_kernel((4, 4), rank=2, init=init)


@pytest.mark.parametrize(
    ("A_shape", "B_shape"), [((2, 8), (2, 6)), ((8, 2), (6, 2)), ((8, 1), (1, 6))]
)
def test_factors_of_another_shape_raise(A_shape: tuple[int, ...], B_shape: tuple[int, ...]) -> None:
    """Transposed factors have as many numbers, so that a reshape would take them for right."""

    def init(key: jax.Array, weight2d: jax.Array, rank: int, scale: float) -> Any:
        return weight2d, jnp.ones(A_shape), jnp.ones(B_shape)

    with pytest.raises(ValueError, match="`init`.*kernel"):
        wrapped_kernel((8, 6), rank=2, init=init)
