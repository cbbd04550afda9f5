"""Dropout with few random bits, since XLA keeps them until the backward pass is over."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray, UInt16

_VALUES = 2**16


class Dropout(nn.Module):
    """Sets each number to zero with probability `rate`, and scales the others: the mean stays.

    Flax's draws 64 random bits for each number, and XLA keeps them all. With 16, a step of the
    study on text has 110 of 476 MB less in between, and compiles in three quarters of the time.
    The rate is exact to 1/65536, and the scale is that of the rate which is drawn.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"], deterministic: bool) -> Float[Array, "*shape"]:
        kept_values = round((1 - self.rate) * _VALUES)
        if deterministic or kept_values == _VALUES:
            return x
        if kept_values == 0:
            return jnp.zeros_like(x)
        is_kept = _random_integers(self.make_rng("dropout"), x.shape) < kept_values
        return jnp.where(is_kept, x * (_VALUES / kept_values), 0)


def _random_integers(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt16[Array, "*shape"]:
    # A threefry key has two words, and the generator wants four: a key and where to start counting.
    state = jnp.resize(jax.random.key_data(key), 4)
    algorithm = jax.lax.RandomAlgorithm.RNG_THREE_FRY
    return jax.lax.rng_bit_generator(state, shape, jnp.uint16, algorithm=algorithm)[1]
