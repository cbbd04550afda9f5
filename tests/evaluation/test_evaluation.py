"""The evaluator of traced programs. The battery compares it with XLA on every op that it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agreement import assert_agree
from tests.evaluation import evaluate


def evaluated(function, *inputs):
    closed_jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*inputs)
    return jax.tree.unflatten(jax.tree.structure(shapes), evaluate(closed_jaxpr, inputs))


def test_a_model_and_its_gradient() -> None:
    random = np.random.default_rng(0)
    w, x = (random.standard_normal(shape).astype(np.float32) for shape in ((6, 4), (5, 6)))

    def loss(w, x):
        hidden = jax.nn.softmax(jnp.tanh(x @ w), axis=-1)
        return jnp.where(hidden > 0.2, hidden, 0.0).sum() + jnp.max(hidden)

    step = jax.value_and_grad(loss)
    assert_agree(evaluated(step, w, x), jax.jit(step)(w, x))


def test_random_bits_are_uniform_and_independent() -> None:
    def drawn(key):
        keys = jax.random.split(key)
        return jax.vmap(lambda key: jax.random.uniform(key, (4000,)))(keys)

    first, second = evaluated(drawn, jax.random.key(1))
    quarters = np.histogram(first, 4, (0, 1))[0] / 4000
    assert np.abs(quarters - 0.25).max() < 0.03
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
    assert not np.array_equal(first, evaluated(drawn, jax.random.key(2))[0])


def test_names_the_op_that_it_does_not_know() -> None:
    with pytest.raises(NotImplementedError, match="erf_inv"):
        evaluated(jax.lax.erf_inv, np.ones(3, np.float32))
