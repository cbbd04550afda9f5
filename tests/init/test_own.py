"""Initialisers of the user's own: what they see, and what they may give."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.arrays import random
from tests.init.initializers import wrapped_kernel


def low_rank_part_taken_out(
    key: jax.Array, weight2d: jax.Array, rank: int, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The principal part becomes the adapter, and the base keeps the rest."""
    U, S, Vt = jnp.linalg.svd(weight2d, full_matrices=False)
    root = jnp.sqrt(S[:rank] / scale)
    A, B = U[:, :rank] * root[None], root[:, None] * Vt[:rank]
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
    params = {"kernel": random(*shape), "other": jnp.ones((3, 3))}
    wrapped = lora_jax.wrap(
        params, "kernel", rank=2, alpha=1.0, axes={"kernel": axes}, init=low_rank_part_taken_out
    )
    assert_agree(lora_jax.merge(wrapped)["kernel"], params["kernel"])
    assert jnp.abs(wrapped["kernel"].base - params["kernel"]).max() > 0.1
    assert_agree(lora_jax.unwrap(wrapped)["kernel"], params["kernel"])
    assert wrapped["other"] is params["other"]


def test_an_initialiser_sees_matrix_rank_and_scale() -> None:
    seen = []

    def init(key: jax.Array, weight2d: jax.Array, rank: int, scale: float) -> Any:
        seen.append((weight2d.shape, rank, scale))
        return lora_jax.init.kaiming(key, weight2d, rank, scale)

    wrapped_kernel((4, 5, 6), rank=2, alpha=3, axes={"kernel": ("in", "out", "out")}, init=init)
    assert seen == [((4, 30), 2, 1.5)]


@pytest.mark.wrong_types
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
