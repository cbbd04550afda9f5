"""How the next token is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.generation import Sampling

SHARES = np.array([0.5, 0.3, 0.15, 0.05])


def frequencies(sampling, count=4000):
    logits = jnp.log(jnp.broadcast_to(jnp.asarray(SHARES[[2, 0, 3, 1]]), (count, 4)))
    drawn = jax.jit(sampling.drawn)(logits, jax.random.key(0))
    return np.bincount(np.asarray(drawn), minlength=4)[[1, 3, 0, 2]] / count


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), SHARES),
        (Sampling(temperature=0.5), SHARES**2 / np.sum(SHARES**2)),
        (Sampling(temperature=1.0, top_p=0.9), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (Sampling(temperature=1.0, top_p=0.5), [1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.01), [1, 0, 0, 0]),
        (Sampling(), [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling, expected):
    np.testing.assert_allclose(frequencies(sampling), expected, atol=0.025)
