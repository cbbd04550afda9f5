"""Statistics of the inputs of a weight."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Num

from lora_jax._serialization import exportable, introduce_to_flax


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputMoments:
    r"""Sums over the rows $x$ that a weight's matrices are multiplied by.

    Sums over disjoint data add up, so that moments can be gathered batch by batch and device by
    device. With $n$ rows, $\mu = \frac1n \sum x$ is their mean, and their covariance is
    $\frac1n \sum x x^\top - \mu \mu^\top$.

    Attributes:
      second: $\sum x x^\top$, of shape (batch, in, in): a matrix for each of the weight's matrices.
      first: $\sum x$, of shape (batch, in).
      count: $n$, of shape (batch,), or one number for all.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> rows = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> moments = lora_jax.init.InputMoments(
      ...     second=(rows.T @ rows)[None], first=rows.sum(0)[None], count=jnp.array([2])
      ... )
      >>> moments.second.shape, moments.first.shape
      ((1, 2, 2), (1, 2))
    """

    second: Float[Array, "batch in in"] | Any
    first: Float[Array, "batch in"] | Any
    count: Num[Array, " batch"] | Any

    def __post_init__(self) -> None:
        introduce_to_flax(type(self))
