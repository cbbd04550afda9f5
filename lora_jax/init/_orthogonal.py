"""lora_A with orthonormal columns."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lora_jax._dtypes import common_dtype


def orthogonal(
    key: PRNGKeyArray, weight2d: Shaped[Array, "in out"], rank: int, scale: float
) -> tuple[Shaped[Array, "in out"], Float[Array, "in r"], Float[Array, "r out"]]:
    r"""Returns the base unchanged, lora_A with random orthonormal columns and lora_B zero.

    $A^\top A = I$, with $A$ uniform among all such matrices. With $G$ the gradient of the loss with
    respect to $W$, the first step of gradient descent at rate $\eta$ then changes the weight by

    $$ \Delta W = -\eta\, s^2 A A^\top G, $$

    the step of full training, projected onto the r directions: none of them is lost or counted
    twice, as with columns that are merely independent.

    PEFT's `"orthogonal"` is another construction, with both factors nonzero and $A B = 0$ by
    halves of one orthogonal matrix. $A B = 0$ with $A$ of rank r is possible only for $B = 0$, so
    there each factor starts with rank r/2, r must be even, and the output is the base model's only
    to rounding; its factor 1/10 ignores the weight's size too. Hence this construction.

    Args:
      key: a random key.
      weight2d: the weight as a matrix (in, out).
      rank: r, the number of columns of lora_A.
      scale: not used.

    Returns:
      base (`weight2d` itself), lora_A (in, r), lora_B (r, out).

    Source: Saxe, McClelland and Ganguli, Exact Solutions to the Nonlinear Dynamics of Learning in
    Deep Linear Neural Networks, 2013, for orthogonal starts; lora_B as in Hu et al. 2021.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> base, lora_A, lora_B = orthogonal(jax.random.key(0), jnp.ones((4, 3)), 2, 1.0)
      >>> bool(jnp.allclose(lora_A.T @ lora_A, jnp.eye(2), atol=1e-6))
      True
    """
    del scale
    inputs, outputs = weight2d.shape
    dtype = common_dtype(weight2d.dtype, jnp.float32)
    lora_A = jax.random.orthogonal(key, inputs, (), dtype, m=rank)
    return weight2d, lora_A, jnp.zeros((rank, outputs), dtype)
