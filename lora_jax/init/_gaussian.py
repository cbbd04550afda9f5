"""Normally distributed lora_A."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lora_jax._dtypes import common_dtype


def gaussian(
    key: PRNGKeyArray,
    weight2d: Shaped[Array, "in out"],
    rank: int,
    scale: float,
    *,
    standard_deviation: float | None = None,
) -> tuple[Shaped[Array, "in out"], Float[Array, "in r"], Float[Array, "r out"]]:
    r"""Returns the base unchanged, lora_A from $N(0, \sigma^2)$ and lora_B zero.

    Args:
      key: a random key.
      weight2d: the weight as a matrix (in, out).
      rank: r, the number of columns of lora_A.
      scale: not used.
      standard_deviation: $\sigma$; 1/r by default, as in PEFT.

    Returns:
      base (`weight2d` itself), lora_A (in, r), lora_B (r, out).

    Source: Hu et al. 2021, section 4.1, which leaves the deviation open.

    Examples:
      >>> import functools, jax.numpy as jnp, lora_jax
      >>> init = functools.partial(lora_jax.init.gaussian, standard_deviation=1.0)
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2, init=init)
    """
    del scale
    inputs, outputs = weight2d.shape
    sigma = 1 / rank if standard_deviation is None else standard_deviation
    dtype = common_dtype(weight2d.dtype, jnp.float32)
    lora_A = sigma * jax.random.normal(key, (inputs, rank), dtype)
    return weight2d, lora_A, jnp.zeros((rank, outputs), dtype)
