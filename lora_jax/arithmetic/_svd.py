"""The best approximation of a product of factors, and the factors of a decomposition."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from lora_jax.init import kaiming


@functools.partial(jax.jit, static_argnames="rank")
def truncated(lora_A: Array, lora_B: Array, rank: int, key: PRNGKeyArray) -> tuple[Array, Array]:
    """Returns the factors of the best approximation of lora_A · lora_B of a lower rank.

    Args:
      lora_A: matrices (batch, in, r).
      lora_B: matrices (batch, r, out).
      rank: the new rank.
      key: a random key for directions in which the product is zero.
    """
    Q_A, R_A = jnp.linalg.qr(lora_A)
    Q_B, R_B = jnp.linalg.qr(lora_B.mT)
    U, S, Vt = jnp.linalg.svd(_product(R_A, R_B.mT), full_matrices=False)
    return balanced_factors(
        _product(Q_A, U[..., :rank]), S[:, :rank], _product(Vt[:, :rank], Q_B.mT), key
    )


@jax.jit
def balanced_factors(U: Array, S: Array, Vt: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
    r"""Returns $U \Sigma^{1/2}$ and $\Sigma^{1/2} V^\top$, two factors of equal norm.

    Where a singular value is zero to rounding, both would be zero and never train: there lora_A
    gets a column as a new adapter does, and lora_B a row of zeros.

    Args:
      U: left singular vectors (batch, in, r).
      S: singular values (batch, r), descending.
      Vt: right singular vectors (batch, r, out).
      key: a random key for new columns.
    """
    batch, inputs, rank = U.shape
    rounding = max(inputs, Vt.shape[-1]) * float(np.finfo(S.dtype).eps) * S[:, :1]
    is_zero = jnp.maximum(rounding, float(np.finfo(S.dtype).tiny)) >= S
    root = jnp.sqrt(S)
    fresh = new_columns(key, batch, inputs, rank, U.dtype)
    lora_A = jnp.where(is_zero[:, None, :], fresh, U * root[:, None, :])
    lora_B = jnp.where(is_zero[..., None], 0, root[..., None] * Vt)
    return lora_A, lora_B


def new_columns(key: PRNGKeyArray, batch: int, inputs: int, count: int, dtype: Any) -> Array:
    """Returns columns of lora_A as a new adapter has them, of shape (batch, in, count)."""
    like = jnp.zeros((inputs, 1), dtype)
    keys = jax.random.split(key, batch)
    return jax.vmap(lambda key: kaiming(key, like, count, 1.0)[1])(keys).astype(dtype)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
