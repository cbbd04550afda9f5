"""The encoder's layers without matrices: what they compute, and what a step keeps of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.bert.layers import Dropout, softmax
from experiments.models.layers import ACTIVATIONS
from tests.agreement import assert_agree

KEY = jax.random.key(0)


def dropped(x, rate, *, key=KEY):
    return Dropout(rate).apply({}, x, deterministic=False, rngs={"dropout": key})


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(400, 501), (7, 30_001), (200_000,)])
def test_numbers_are_zero_at_the_rate_and_the_mean_stays(shape, rate):
    outputs = np.asarray(dropped(jnp.ones(shape), rate), np.float64)
    deviation = np.sqrt(rate * (1 - rate) / outputs.size)
    assert abs((outputs == 0).mean() - rate) < 4 * deviation
    assert abs(outputs.mean() - 1) < 4 * deviation / (1 - rate)
    (scale,) = np.unique(outputs[outputs != 0])
    assert scale == pytest.approx(1 / (1 - rate), rel=2e-4)


def test_neighbours_and_rows_are_independent():
    zero = np.asarray(dropped(jnp.ones((600, 600)), 0.5) == 0, np.float64) - 0.5
    for shift in [(0, 1), (0, 2), (1, 0), (3, 5)]:
        correlation = (zero * np.roll(zero, shift, axis=(0, 1))).mean() / 0.25
        assert abs(correlation) < 4 / zero.size**0.5


def test_the_backward_pass_drops_what_the_forward_pass_did():
    x = jnp.linspace(1, 2, 1000)
    outputs, pull = jax.vjp(lambda x: dropped(x, 0.3), x)
    (gradient,) = pull(jnp.ones_like(x))
    assert_agree(gradient * x, outputs)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_all_and_none_are_rates_too(rate):
    x = jnp.linspace(1, 2, 10)
    assert jnp.array_equal(dropped(x, rate), x * (1 - rate))


def test_it_is_off_where_all_is_deterministic():
    x = jnp.linspace(1, 2, 10)
    assert jnp.array_equal(Dropout(0.5).apply({}, x, deterministic=True), x)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_other_keys_drop_other_numbers(implementation):
    x = jnp.ones(1000)
    first, again, other = (
        dropped(x, 0.5, key=jax.random.key(seed, impl=implementation)) for seed in (0, 0, 1)
    )
    assert jnp.array_equal(first, again)
    assert 400 < int((first != other).sum()) < 600


def test_a_step_keeps_two_bytes_for_each_number():
    x = jnp.ones((64, 1024))

    def loss(x):
        return jnp.sin(dropped(jnp.cos(x), 0.5)).sum()

    def stored(fn):
        return jax.jit(jax.grad(fn)).lower(x).compile().memory_analysis().temp_size_in_bytes

    # Both keep what sine and cosine need; the random bits come on top.
    assert stored(loss) <= stored(lambda x: jnp.sin(jnp.cos(x)).sum()) + 2 * x.size + 4096


def test_the_slope_of_a_softmax_is_that_of_its_formula():
    scores, change = (
        np.random.default_rng(seed).standard_normal((2, 3, 5)) * 3 for seed in range(2)
    )
    shares = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    expected = shares * (change - (shares * change).sum(axis=-1, keepdims=True))
    found, pull = jax.vjp(softmax, jnp.asarray(scores, jnp.float32))
    assert_agree(found, shares)
    assert_agree(pull(jnp.asarray(change, jnp.float32))[0], expected)


def test_between_the_passes_of_a_step_little_is_kept():
    """The inputs of the widest activations and the shares, and neither twice."""
    x = jnp.ones((64, 128))
    for function in (ACTIVATIONS["gelu"], softmax):
        step = jax.jit(lambda x, fn=function: jax.vjp(fn, x)[1])
        kept = jax.tree.leaves(step(x))
        assert sum(array.nbytes for array in kept) == x.nbytes
