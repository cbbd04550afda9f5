"""Small r × r systems, the same for weights of any axes."""

import string
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float

from lora_jax._dtypes import common_dtype, epsilon
from lora_jax._partition import base_sharding, cut_as
from lora_jax._shapes import Axes

Side = Literal["in", "out"]


def preconditioned(
    gradient: Float[Array, "..."],
    factor: Float[Array, "..."],
    axes: Axes,
    side: Side,
    *,
    damping: float | Array,
    scale: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    r"""Returns a factor's gradient times $(F^\top F + \delta I)^{-1} / s^2$ of the other factor.

    The result is cut over a mesh as the gradient is.

    Args:
      gradient: the gradient of lora_A (\*batch, \*in, r) or of lora_B (\*batch, r, \*out).
      factor: the other factor.
      axes: the roles of the weight's axes.
      side: what `factor` holds: `"in"` for lora_A, `"out"` for lora_B.
      damping: $\delta$, a positive number.
      scale: $s$, one for each slot of a bank; 1 unless given.
    """
    other_side: Side = "out" if side == "in" else "in"

    def computed(gradient: Array, factor: Array, damping: Array, scale: Array | None) -> Array:
        inverse = inverse_gram(factor, axes, side, damping)
        if scale is not None:
            # Where the scale is zero, so is the gradient, and no step can change the weight.
            divisor = jnp.where(scale == 0, 1, scale).astype(inverse.dtype)
            inverse /= divisor.reshape(divisor.shape + (1,) * (inverse.ndim - divisor.ndim)) ** 2
        return times(gradient, inverse, axes, other_side)

    return cut_as(base_sharding(gradient), computed, gradient, factor, jnp.asarray(damping), scale)


def inverse_gram(
    factor: Float[Array, "..."], axes: Axes, side: Side, damping: float | Array
) -> Float[Array, "*batch r r"]:
    r"""Returns $(F^\top F + \delta I)^{-1}$ of a factor with its rank last, in float32 or wider.

    The entries of $F^\top F$ are sums of n products and so have an error of about
    $\sqrt n\, \epsilon \lVert F^\top F \rVert$. Damping below that would leave a factor without
    full rank to chance: directions that aren't there get an inverse made of rounding errors, or the
    Cholesky decomposition fails. So $\delta$ is `damping`, and at least four times that error;
    of a factor of zeros at least the smallest number of the dtype, where `damping` rounds to zero.

    Args:
      factor: lora_A (\*batch, \*in, r) or lora_B (\*batch, r, \*out).
      axes: the roles of the weight's axes.
      side: `"in"` for lora_A, `"out"` for lora_B.
      damping: a positive number.
    """
    wide = common_dtype(factor.dtype, jnp.float32)
    columns = _rank_last(factor.astype(wide), axes, side)
    letters = _side_letters(axes, side)
    gram = jnp.einsum(
        f"...{letters}y,...{letters}z->...yz",
        columns,
        columns,
        precision=jax.lax.Precision.HIGHEST,
    )
    terms = factor.size // (gram.size // gram.shape[-1])
    norm = jnp.linalg.norm(gram, axis=(-2, -1), keepdims=True)
    rounding = jnp.maximum(4 * terms**0.5 * epsilon(wide) * norm, float(np.finfo(wide).tiny))
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=wide), gram.shape)
    delta = jnp.maximum(jnp.asarray(damping, wide), rounding)
    lower = jnp.linalg.cholesky(gram + delta * identity)
    return cho_solve((lower, True), identity)


def times(
    update: Float[Array, "..."], matrices: Float[Array, "*batch r r"], axes: Axes, side: Side
) -> Float[Array, "..."]:
    """Returns a factor's update with symmetric `matrices` multiplied onto its rank.

    The r × r inverse is multiplied rather than solved against: a product stays where the update's
    shards are, a triangular solve would gather them.
    """
    letters = _side_letters(axes, side)
    wide = common_dtype(update.dtype, matrices.dtype)
    product = jnp.einsum(
        f"...{letters}y,...yz->...{letters}z",
        _rank_last(update.astype(wide), axes, side),
        matrices.astype(wide),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.moveaxis(product, -1, _rank_axis(axes, side)).astype(update.dtype)


def _rank_last(factor: Array, axes: Axes, side: Side) -> Array:
    return jnp.moveaxis(factor, _rank_axis(axes, side), -1)


def _rank_axis(axes: Axes, side: Side) -> int:
    """Returns the rank's axis, counted from the end: a bank has an axis of slots in front."""
    return -1 - axes.count("out") if side == "out" else -1


def _side_letters(axes: Axes, side: Side) -> str:
    return string.ascii_lowercase[: axes.count(side)]
