"""Minor component adaptation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lora_jax.init._linear_algebra import singular_value_decomposition, widened
from lora_jax.init._protocol import Frozen


def mica(
    key: PRNGKeyArray, weight2d: Shaped[Array, "in out"], rank: int, scale: float
) -> tuple[Shaped[Array, "in out"], Float[Array, "in r"], Frozen]:
    r"""Returns the base unchanged, lora_A zero, and as a frozen lora_B the minor output directions.

    The paper writes a layer as $y = W^\top x$ with $W^\top$ of shape (out, in), and freezes the
    left singular vectors of $W^\top$ with the smallest singular values: directions of the output
    that the weight hardly writes to. With $W = U \Sigma V^\top$ here those are columns of $V$:

    $$ A = 0, \qquad B = V_{k-r+1 \dots k}^\top \text{ (frozen)}, \qquad k = \min(in, out). $$

    Only $A$ trains, so that whatever it learns changes the output along these r directions alone.
    Where several singular values are equal, their vectors are any orthonormal ones.

    Args:
      key: not used.
      weight2d: the weight as a matrix (in, out).
      rank: r.
      scale: not used.

    Returns:
      base (`weight2d` itself), lora_A (in, r), lora_B (r, out) in a `Frozen`.

    Source: Rüdiger and Raschka, MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning, 2026.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> weight = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
      >>> base, lora_A, lora_B = mica(jax.random.key(0), weight, 1, 1.0)
      >>> abs(lora_B.array).tolist()
      [[0.0, 0.0, 1.0]]
    """
    del key, scale
    _, _, Vt = singular_value_decomposition(widened(weight2d))
    lora_B = Vt[-rank:]
    return weight2d, jnp.zeros((weight2d.shape[0], rank), lora_B.dtype), Frozen(lora_B)
