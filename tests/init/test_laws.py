"""What holds for every initialiser: the model stays what it was, and no factor is NaN."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.arrays import random
from tests.init.initializers import (
    INITIALIZERS,
    KEEPS_THE_BASE,
    SHAPES,
    as_matrices,
    initialised,
    wrapped_kernel,
)


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
@pytest.mark.parametrize("name", INITIALIZERS)
def test_the_model_stays_what_it_was(
    name: str, shape: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    leaf = random(*shape)
    weight = initialised(name, leaf, axes)
    assert_agree(lora_jax.merge(weight), leaf, tolerance=2e-6)
    assert (weight.base is leaf) == (name in KEEPS_THE_BASE)
    if weight.base is leaf:
        np.testing.assert_array_equal(lora_jax.merge(weight), leaf)
    _, A, B = as_matrices(weight)
    assert np.any(A, axis=(1, 2)).all() or np.any(B, axis=(1, 2)).all()


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_bfloat16_weight_gets_float32_factors(name: str) -> None:
    leaf = random(3, 12, 10, dtype=jnp.bfloat16)
    weight = initialised(name, leaf, ("batch", "in", "out"))
    assert (weight.base.dtype, weight.lora_A.dtype) == (jnp.bfloat16, jnp.float32)
    assert_agree(lora_jax.merge(weight), leaf, tolerance=float(jnp.finfo(jnp.bfloat16).eps))


def rank_one(inputs: int, outputs: int) -> jax.Array:
    return jnp.outer(jnp.linspace(-1, 2, inputs), jnp.linspace(-2, 1, outputs))


DEGENERATE_WEIGHTS = {
    "zero": jnp.zeros((12, 10)),
    "equal entries": jnp.ones((12, 10)),
    "equal singular values": jnp.eye(12, 10),
    "rank one": rank_one(12, 10),
    "tiny": 1e-18 * rank_one(12, 10),
    "huge": 1e15 * rank_one(12, 10),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", INITIALIZERS)
def test_degenerate_weights_give_finite_factors(name: str, transposed: bool) -> None:
    stack = jnp.stack(list(DEGENERATE_WEIGHTS.values()))
    axes = ("batch", "out", "in") if transposed else ("batch", "in", "out")
    weight = initialised(name, stack, axes, rank=5)
    assert all(jnp.isfinite(array).all() for array in jax.tree.leaves(weight))
    for merged, leaf in zip(lora_jax.merge(weight), stack, strict=True):
        # LoRA-GA takes its factors from the gradient, whatever the size of the weight.
        assert_agree(merged, leaf, size=np.linalg.norm(leaf) + leaf.size**0.5, tolerance=1e-6)


@pytest.mark.parametrize("name", ["gaussian", "kaiming", "mica", "olora", "orthogonal", "pissa"])
def test_a_name_is_the_function(name: str) -> None:
    by_name = wrapped_kernel((20, 10), init=name)
    by_function = wrapped_kernel((20, 10), init=getattr(lora_jax.init, name))
    np.testing.assert_array_equal(by_name.lora_A, by_function.lora_A)
    assert lora_jax.init.initializer(name) is getattr(lora_jax.init, name)


def test_the_errors_name_every_initialiser() -> None:
    with pytest.raises(ValueError, match="`init` is 'nope'") as caught:
        wrapped_kernel((4, 4), rank=2, init="nope")
    public = {name for name, value in vars(lora_jax.init).items() if inspect.isfunction(value)}
    for name in public - {"eva_ranks", "initializer", "input_moments"}:
        assert name in str(caught.value)
