"""Explained variance adaptation."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lora_jax.init._data import DataInitializer, moments_per_matrix, second_moment
from lora_jax.init._linear_algebra import widened, with_fixed_signs
from lora_jax.init._moments import InputMoments


def eva(
    moments: Mapping[str, InputMoments], *, centred: bool = True, whiten: bool = False
) -> DataInitializer:
    r"""Returns an initialiser with the inputs' principal components as lora_A and lora_B zero.

    With the covariance of the inputs $x$ of a weight,

    $$ \tfrac1n \textstyle\sum x x^\top - \mu \mu^\top = V \Lambda V^\top, \qquad
       A = V_r, \qquad B = 0, $$

    where $\Lambda$ descends: the r directions of the input that explain the most of its variance,
    and the right singular vectors of the matrix that has the centred inputs as rows. A column's
    entry of the largest magnitude is positive, so that the result does not depend on the machine.

    As in PEFT the inputs are centred. PEFT finds the components batch by batch and approximately;
    these are exact. Its `whiten` divides by the fourth root of $n \Lambda$, which depends on the
    amount of data; this one divides by $\sqrt\Lambda$, which makes the variances 1.

    Args:
      moments: for each path of a weight, the moments of its inputs.
      centred: whether $\mu$ is subtracted.
      whiten: whether each column is divided by the standard deviation of the inputs along it, where
        that is not zero.

    Returns:
      What `init=` of `wrap` takes; base (the weight itself), lora_A (in, r), lora_B (r, out).

    Raises:
      TypeError: `moments` is not a mapping from path to `InputMoments`.

    Source: Paischer et al., Parameter Efficient Fine-tuning via Explained Variance Adaptation,
    2024.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> rows = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, -3.0]])
      >>> moments = lora_jax.init.InputMoments(
      ...     second=(rows.T @ rows)[None], first=rows.sum(0)[None], count=jnp.array([4])
      ... )
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> init = lora_jax.init.eva({"kernel": moments})
      >>> lora_jax.wrap(params, "kernel", rank=1, init=init)["kernel"].lora_A.tolist()
      [[0.0], [1.0]]
    """
    function = functools.partial(_principal_components, centred=centred, whiten=whiten)
    return DataInitializer(function, moments_per_matrix(moments))


def eva_ranks(
    moments: Mapping[str, InputMoments],
    *,
    rank: int = 8,
    rho: float = 2.0,
    alpha: float | None = None,
    centred: bool = True,
) -> dict[str, dict[str, Any]]:
    r"""Returns `targets` whose ranks share out a budget by how much variance each rank explains.

    Component $i$ of a weight explains the share $\lambda_i / \sum_j \lambda_j$ of the variance of
    its inputs. The budget is what rank r would cost in every weight; it goes to the components of
    all weights in descending order of their shares, and a weight gets at most $\rho r$ of them. A
    weight that gets none is not adapted, as in PEFT.

    Where one path holds several matrices (stacked layers, experts), they share one rank: their
    shares are averaged, and a rank costs as many as there are matrices.

    Args:
      moments: for each path of a weight, the moments of its inputs.
      rank: r, the average rank.
      rho: $\rho \ge 1$; with 1 every weight gets rank r. A weight whose smaller side is its output
        needs $\rho r$ of at most that side.
      alpha: $\alpha$ at rank r. If given, each target has an `alpha` in proportion to its rank, so
        that the scale $\alpha / r$ is the same everywhere, as with PEFT's
        `adjust_scaling_factors`. With wrap's default of $\alpha = r$ it is 1 everywhere.
      centred: as in `eva`.

    Returns:
      The overrides of each adapted path, keyed by an expression that matches this path alone.

    Raises:
      TypeError: `moments` is not a mapping from path to `InputMoments`.
      ValueError: `rank` or `rho` is below 1.

    Source: Paischer et al., Parameter Efficient Fine-tuning via Explained Variance Adaptation,
    2024, section 3.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> def moments(variances):
      ...     second = 10 * jnp.diag(jnp.array(variances))[None]
      ...     return lora_jax.init.InputMoments(second, jnp.zeros((1, 4)), jnp.array([10]))
      >>> seen = {"even": moments([1.0, 1.0, 1.0, 1.0]), "uneven": moments([5.0, 3.0, 0.1, 0.1])}
      >>> lora_jax.init.eva_ranks(seen, rank=1)
      {'^uneven$': {'rank': 2}}
    """
    for name, value in (("rank", rank), ("rho", rho)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; expected a number of at least 1.")
    shares = {
        path: _explained_shares(value, centred)[: round(rank * rho)]
        for path, value in moments_per_matrix(moments).items()
    }
    costs = {path: moments[path].first.shape[0] for path in shares}
    ranks = dict.fromkeys(shares, 0)
    left = rank * sum(costs.values())
    components = [(share, path) for path in shares for share in shares[path]]
    for _, path in sorted(components, key=lambda component: -component[0]):
        if costs[path] <= left:
            ranks[path] += 1
            left -= costs[path]
    return {
        f"^{re.escape(path)}$": _overrides(count, rank, alpha)
        for path, count in ranks.items()
        if count > 0
    }


def _principal_components(
    key: PRNGKeyArray,
    weight2d: Shaped[Array, "in out"],
    rank: int,
    scale: float,
    moments: InputMoments,
    *,
    centred: bool,
    whiten: bool,
) -> tuple[Shaped[Array, "in out"], Float[Array, "in r"], Float[Array, "r out"]]:
    del key, scale
    dtype = widened(weight2d).dtype
    second = second_moment(moments, weight2d, dtype)
    covariance = _covariance(
        second, moments.first.astype(dtype), moments.count.astype(dtype), centred
    )
    variances, vectors = jnp.linalg.eigh(covariance)
    lora_A = with_fixed_signs(vectors[:, ::-1][:, :rank])
    if whiten:
        lora_A = lora_A / _deviations(variances[::-1], covariance.shape[0])[None, :rank]
    return weight2d, lora_A, jnp.zeros((rank, weight2d.shape[1]), dtype)


def _covariance(
    second: Float[Array, "*batch in in"],
    first: Float[Array, "*batch in"],
    count: Float[Array, "*batch"],
    centred: bool,
) -> Float[Array, "*batch in in"]:
    # A weight that has seen no rows (an expert that nothing was routed to) has no covariance; use
    # zero instead of 0/0.
    rows = jnp.maximum(count, 1)[..., None, None]
    mean = first[..., None] / rows
    return second / rows - (mean * jnp.swapaxes(mean, -1, -2) if centred else 0)


def _deviations(variances: Float[Array, "in"], inputs: int) -> Float[Array, "in"]:
    """Returns the standard deviations, and 1 for those that are zero to rounding."""
    rounding = inputs * np.finfo(variances.dtype).eps * variances[0]
    is_zero = variances <= jnp.maximum(rounding, 0)
    return jnp.where(is_zero, 1, jnp.sqrt(jnp.where(is_zero, 1, variances)))


def _explained_shares(moments: InputMoments, centred: bool) -> list[float]:
    """Returns the shares of the variance in descending order, averaged over the matrices."""
    dtype = widened(moments.second).dtype
    covariance = _covariance(
        moments.second.astype(dtype),
        moments.first.astype(dtype),
        moments.count.astype(dtype),
        centred,
    )
    variances = np.maximum(np.asarray(jnp.linalg.eigvalsh(covariance))[:, ::-1], 0)
    total = variances.sum(axis=1, keepdims=True)
    shares = variances / np.where(total > 0, total, 1)
    return shares.mean(axis=0).tolist()


def _overrides(count: int, rank: int, alpha: float | None) -> dict[str, Any]:
    return {"rank": count} if alpha is None else {"rank": count, "alpha": alpha * count / rank}
