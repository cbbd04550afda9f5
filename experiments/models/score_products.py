"""The two products of attention that have scores, with gradients that read scores in their order.

With scores and shares S and P of shape (rows, keys), queries Q, keys K and values V,

    S = Q Kᵀ    dQ = dS K     dK = dSᵀ Q
    O = P V     dP = dO Vᵀ    dV = Pᵀ dO

On CPUs XLA's products that read their left operand across its order, as dK and dV do, take three
times as long as the others, and reading scores once more to transpose them takes as long. So the
small operand is transposed, (Qᵀ dS)ᵀ and (dOᵀ P)ᵀ.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Small = Float[Array, "batch shared rows dim"]
Shared = Float[Array, "batch shared keys dim"]
Scores = Float[Array, "batch shared rows keys"]


@jax.custom_vjp
def scores_of(rows: Small, key: Shared) -> Scores:
    """Returns the products of rows and keys, in float32."""
    return jnp.einsum("bkrd,bksd->bkrs", rows, key, preferred_element_type=jnp.float32)


def _scores_and_kept(rows: Small, key: Shared) -> tuple[Scores, tuple[Small, Shared]]:
    return scores_of(rows, key), (rows, key)


def _gradients_of_scores(kept: tuple[Small, Shared], of_scores: Scores) -> tuple[Small, Shared]:
    rows, key = kept
    of_rows = jnp.einsum("bkrs,bksd->bkrd", of_scores, key)
    return of_rows.astype(rows.dtype), _across(of_scores, rows).astype(key.dtype)


@jax.custom_vjp
def mixed(shares: Scores, value: Shared) -> Small:
    """Returns the sums of values that are weighted by the shares of each row."""
    return jnp.einsum("bkrs,bksd->bkrd", shares, value)


def _mixed_and_kept(shares: Scores, value: Shared) -> tuple[Small, tuple[Scores, Shared]]:
    return mixed(shares, value), (shares, value)


def _gradients_of_mixed(kept: tuple[Scores, Shared], of_mixed: Small) -> tuple[Scores, Shared]:
    shares, value = kept
    of_shares = jnp.einsum("bkrd,bksd->bkrs", of_mixed, value)
    return of_shares, _across(shares, of_mixed)


scores_of.defvjp(_scores_and_kept, _gradients_of_scores)
mixed.defvjp(_mixed_and_kept, _gradients_of_mixed)


def _across(scores: Scores, rows: Small) -> Shared:
    """Returns scoresᵀ · rows."""
    return _turned(jnp.einsum("bkdr,bkrs->bkds", _turned(rows), scores))


def _turned(array: Array) -> Array:
    """Returns an array with its last two axes exchanged, in memory where that is of use.

    Without the barriers XLA makes the transposition a part of the product, which then reads one of
    its operands across its order. Elsewhere than on CPUs it chooses layouts itself.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(
        array,
        cpu=lambda array: barrier(barrier(array).swapaxes(-1, -2)),
        default=lambda array: array.swapaxes(-1, -2),
    )
