"""Principal singular values and singular vectors adaptation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lora_jax.init._linear_algebra import leading_singular_vectors, residual, widened


def pissa(
    key: PRNGKeyArray,
    weight2d: Shaped[Array, "in out"],
    rank: int,
    scale: float,
    *,
    power_iterations: int | None = None,
    oversampling: int = 10,
) -> tuple[Shaped[Array, "in out"], Float[Array, "in r"], Float[Array, "r out"]]:
    r"""Returns the weight's principal part as the factors, and the rest of it as the base.

    With the singular value decomposition $W = U \Sigma V^\top$ and its r largest singular values,

    $$ A = U_r \sqrt{\Sigma_r / s}, \qquad B = \sqrt{\Sigma_r / s}\; V_r^\top, \qquad
       W_0 = W - s A B, $$

    so that $s A B = U_r \Sigma_r V_r^\top$ is the best approximation of $W$ of rank r, and both
    factors have the same norm. The model's outputs are unchanged, to rounding. If the weight's own
    rank is below r, both factors are zero beyond it, and nothing trains there.

    Args:
      key: a random key; not used without `power_iterations`.
      weight2d: the weight as a matrix (in, out).
      rank: r.
      scale: s.
      power_iterations: the number of power iterations of a randomised decomposition, for large
        weights: it costs O(in · out · r) instead of O(in · out · min(in, out)). 4 is plenty for
        singular values that decay. By default the decomposition is exact.
      oversampling: how many directions the randomised decomposition follows beyond r. PEFT's
        `"pissa_niter_4"` follows none, and finds the last few of the r less exactly.

    Returns:
      base (in, out), lora_A (in, r), lora_B (r, out).

    Raises:
      ValueError: `power_iterations` or `oversampling` is negative.

    Source: Meng, Wang and Zhang, PiSSA: Principal Singular Values and Singular Vectors Adaptation
    of Large Language Models, 2024; Halko, Martinsson and Tropp, Finding Structure with Randomness,
    2011.

    Examples:
      >>> import functools, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
      >>> wrapped = lora_jax.wrap(params, "kernel", rank=1, init="pissa")
      >>> wrapped["kernel"].base.round(2).diagonal().tolist()
      [0.0, 2.0, 1.0]
      >>> fast = functools.partial(lora_jax.init.pissa, power_iterations=4)
      >>> wrapped = lora_jax.wrap(params, "kernel", rank=1, init=fast)
    """
    U, S, Vt = leading_singular_vectors(
        key,
        widened(weight2d),
        rank,
        power_iterations=power_iterations,
        oversampling=oversampling,
    )
    root = jnp.sqrt(S / scale)
    lora_A, lora_B = U * root[None], root[:, None] * Vt
    return residual(weight2d, scale, lora_A, lora_B), lora_A, lora_B
