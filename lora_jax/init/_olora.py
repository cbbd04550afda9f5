"""Orthonormal low-rank adaptation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lora_jax.init._linear_algebra import residual, widened


def olora(
    key: PRNGKeyArray, weight2d: Shaped[Array, "in out"], rank: int, scale: float
) -> tuple[Shaped[Array, "in out"], Float[Array, "in r"], Float[Array, "r out"]]:
    r"""Returns factors from the weight's QR decomposition, and the rest of the weight as the base.

    The paper writes a layer as $y = W^\top x$ with $W^\top = Q R$ of shape (out, in). Here that is

    $$ A = R_r^\top, \qquad B = Q_r^\top, \qquad W_0 = W - s A B, $$

    with the first r columns of $Q$ and the first r rows of $R$: $B$ has orthonormal rows that span
    the first r rows of $W$, and $A$ holds the coordinates of all rows of $W$ in them. At s = 1
    those first r rows of $W_0$ are therefore zero. The model's outputs are unchanged, to rounding.

    Args:
      key: not used.
      weight2d: the weight as a matrix (in, out).
      rank: r.
      scale: s. As in PEFT, the factors do not depend on it.

    Returns:
      base (in, out), lora_A (in, r), lora_B (r, out).

    Source: Büyükakyüz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, 2024.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.array([[3.0, 4.0], [1.0, 1.0]])}
      >>> weight = lora_jax.wrap(params, "kernel", rank=1, init="olora")["kernel"]
      >>> abs(weight.lora_B).round(3).tolist(), abs(weight.base[0]).round(3).tolist()
      ([[0.6..., 0.8...]], [0.0, 0.0])
    """
    del key
    Q, R = jnp.linalg.qr(widened(weight2d).T)
    lora_A, lora_B = R[:rank].T, Q[:, :rank].T
    return residual(weight2d, scale, lora_A, lora_B), lora_A, lora_B
