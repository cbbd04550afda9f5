"""The initialisation of the paper's own code, and the default here."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lora_jax._dtypes import common_dtype


def kaiming(
    key: PRNGKeyArray, weight2d: Shaped[Array, "in out"], rank: int, scale: float
) -> tuple[Shaped[Array, "in out"], Float[Array, "in r"], Float[Array, "r out"]]:
    r"""Returns the base unchanged, lora_A uniform in $\pm 1/\sqrt{in}$ and lora_B zero.

    The bound is that of He et al.'s uniform initialisation, $\sqrt{6 / ((1 + a^2)\, in)}$, with
    $a = \sqrt 5$, as `loralib` and PEFT call it.

    Args:
      key: a random key.
      weight2d: the weight as a matrix (in, out).
      rank: r, the number of columns of lora_A.
      scale: not used.

    Returns:
      base (`weight2d` itself), lora_A (in, r), lora_B (r, out).

    Source: Hu et al. 2021, and the code published with it.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> base, lora_A, lora_B = kaiming(jax.random.key(0), jnp.ones((4, 3)), 2, 1.0)
      >>> bool((abs(lora_A) <= 0.5).all()), bool((lora_B == 0).all())
      (True, True)
    """
    del scale
    inputs, outputs = weight2d.shape
    bound = inputs**-0.5
    dtype = common_dtype(weight2d.dtype, jnp.float32)
    lora_A = jax.random.uniform(key, (inputs, rank), dtype, minval=-bound, maxval=bound)
    return weight2d, lora_A, jnp.zeros((rank, outputs), dtype)
