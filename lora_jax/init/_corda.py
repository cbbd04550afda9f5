"""Context-oriented decomposition adaptation."""

import functools
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lora_jax.init._data import DataInitializer, moments_per_matrix, second_moment
from lora_jax.init._linear_algebra import (
    product,
    residual,
    singular_value_decomposition,
    widened,
)
from lora_jax.init._moments import InputMoments


def corda(
    moments: Mapping[str, InputMoments],
    *,
    mode: Literal["ipm", "kpm"] = "ipm",
    damping: float = 0.01,
) -> DataInitializer:
    r"""Returns an initialiser that splits a weight by how much each part acts on given inputs.

    With $C$ the second moment $\sum x x^\top$ of the inputs, scaled to a mean diagonal of 1, and
    $\tilde C = C + \delta I$, the paper decomposes $W^\top \tilde C = U \Sigma V^\top$ and takes r
    components of $W^\top = U \Sigma V^\top \tilde C^{-1}$, with the square root of $\Sigma$ in
    each factor. Transposed, with $\tilde C W = V \Sigma U^\top$:

    $$ A = \tilde C^{-1} V_r \sqrt{\Sigma_r / s} = W U_r / \sqrt{s \Sigma_r}, \qquad
       B = \sqrt{\Sigma_r / s}\; U_r^\top, \qquad W_0 = W - s A B. $$

    The second form of $A$ follows from $\tilde C W U_r = V_r \Sigma_r$. It needs no inverse, and
    shows that $s A B = W U_r U_r^\top$ is the weight, projected onto r directions of its output.
    The model's outputs are unchanged, to rounding.

    PEFT has the same product and base if it sees all inputs in one call. It divides the inputs of
    each call by their maximum, which weighs calls unequally; here all rows count equally. The scale
    of $C$ cancels in the product; normalising it by the mean diagonal makes the balance between the
    two factors independent of the units of the inputs. PEFT raises $\delta$ until it can
    invert $\tilde C$; there is nothing to invert here.

    Args:
      moments: for each path of a weight, the moments of its inputs: in `"ipm"` mode from the new
        task, in `"kpm"` mode from data on what the model should keep.
      mode: `"ipm"`, the instruction-previewed mode, trains the r components with the largest
        singular values; `"kpm"`, the knowledge-preserved mode, those with the smallest.
      damping: $\delta$, which compensates for inputs that do not span all directions.

    Returns:
      What `init=` of `wrap` takes; base (in, out), lora_A (in, r), lora_B (r, out).

    Raises:
      TypeError: `moments` is not a mapping from path to `InputMoments`.
      ValueError: `mode` is neither, or `damping` is not positive.

    Source: Yang et al., CorDA: Context-Oriented Decomposition Adaptation of Large Language Models
    for Task-Aware Parameter-Efficient Fine-tuning, 2024.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> rows = jnp.array([[0.1, 0.0], [0.0, 5.0]])
      >>> moments = lora_jax.init.InputMoments(
      ...     second=(rows.T @ rows)[None], first=rows.sum(0)[None], count=jnp.array([2])
      ... )
      >>> params = {"kernel": jnp.array([[2.0, 0.0], [0.0, 1.0]])}
      >>> init = lora_jax.init.corda({"kernel": moments})
      >>> lora_jax.wrap(params, "kernel", rank=1, init=init)["kernel"].base.tolist()
      [[2.0, 0.0], [0.0, 0.0]]
    """
    if mode not in ("ipm", "kpm"):
        raise ValueError(f"`mode` is {mode!r}; expected 'ipm' or 'kpm'.")
    if not damping > 0:
        raise ValueError(f"`damping` is {damping}; expected a positive number, such as 0.01.")
    function = functools.partial(_context_oriented, mode=mode, damping=damping)
    return DataInitializer(function, moments_per_matrix(moments))


def _context_oriented(
    key: PRNGKeyArray,
    weight2d: Shaped[Array, "in out"],
    rank: int,
    scale: float,
    moments: InputMoments,
    *,
    mode: Literal["ipm", "kpm"],
    damping: float,
) -> tuple[Shaped[Array, "in out"], Float[Array, "in r"], Float[Array, "r out"]]:
    del key
    W = widened(weight2d)
    C = _damped(second_moment(moments, weight2d, W.dtype), damping)
    _, S, Ut = singular_value_decomposition(product(C, W))
    chosen = slice(None, rank) if mode == "ipm" else slice(-rank, None)
    root = jnp.sqrt(_positive(S)[chosen] / scale)
    lora_A = product(W, Ut[chosen].T) / (scale * root[None])
    lora_B = root[:, None] * Ut[chosen]
    return residual(weight2d, scale, lora_A, lora_B), lora_A, lora_B


def _damped(second: Float[Array, "in in"], damping: float) -> Float[Array, "in in"]:
    mean_diagonal = jnp.trace(second) / second.shape[0]
    identity = jnp.eye(second.shape[0], dtype=second.dtype)
    # Without any input there is no context, and the weight's own decomposition remains.
    scaled = jnp.where(
        mean_diagonal > 0, second / jnp.where(mean_diagonal > 0, mean_diagonal, 1), identity
    )
    return scaled + damping * identity


def _positive(S: Float[Array, " k"]) -> Float[Array, " k"]:
    """Returns the singular values, with those that are zero to rounding replaced by that rounding.

    The product of the factors holds for any positive values, and so stays finite and exact where
    the weight's rank is below r.
    """
    limits = np.finfo(S.dtype)
    return jnp.maximum(S, jnp.maximum(limits.eps * S[0], limits.tiny))
