"""The activations, by their formulas and as PyTorch has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments.models.layers import ACTIVATIONS
from tests.agreement import assert_agree


def test_gelu_and_its_slope_are_those_of_the_formula():
    x = np.linspace(-6, 6, 101)
    normal = scipy.stats.norm
    gelu = ACTIVATIONS["gelu"]
    values = gelu(jnp.asarray(x, jnp.float32))
    slopes = jax.vmap(jax.grad(gelu))(jnp.asarray(x, jnp.float32))
    assert_agree(values, x * normal.cdf(x))
    assert_agree(slopes, normal.cdf(x) + x * normal.pdf(x))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations")
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = activations.ACT2FN[name](torch.tensor(x))
    assert_agree(ACTIVATIONS[name](jnp.asarray(x)), expected.numpy())
