"""Merging arrays that were learned for different tasks: pruning, electing signs, summing.

All values have the shape (task, matrix, row, column), and each matrix of each task, such as one
layer of a stack, is pruned separately.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

MajoritySign = Literal["total", "frequency"]
Values = Float[Array, "task matrix row column"]
Merged = Float[Array, "matrix row column"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to merge: what to drop from each task's values, and how to add up the rest.

    Attributes:
      prunes: what to drop: all but the largest, a random choice, or nothing.
      elects: whether to elect a sign for each entry and average the values that agree with it.
    """

    prunes: Literal["largest", "random"] | None
    elects: bool

    @functools.partial(jax.jit, static_argnames=("self", "density", "majority_sign"))
    def merged(
        self,
        values: Values,
        weights: Float[Array, " task"],
        *,
        density: float,
        majority_sign: MajoritySign,
        key: PRNGKeyArray,
    ) -> Merged:
        """Returns one array for all tasks."""
        if self.prunes == "largest":
            values = largest_kept(values, density)
        elif self.prunes == "random":
            values = randomly_kept(values, density, key)
        weighted = weights.reshape(-1, 1, 1, 1) * values
        return agreeing_mean(weighted, majority_sign) if self.elects else jnp.sum(weighted, axis=0)


RECIPES = {
    "linear": Recipe(None, elects=False),
    "magnitude_prune": Recipe("largest", elects=False),
    "ties": Recipe("largest", elects=True),
    "dare_linear": Recipe("random", elects=False),
    "dare_ties": Recipe("random", elects=True),
}


def largest_kept(values: Values, density: float) -> Values:
    """Returns the values with a share of each matrix kept, the largest by magnitude.

    Source: Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023, section 4
    (trim).
    """
    flat = values.reshape(*values.shape[:2], -1)
    count = max(1, round(density * flat.shape[-1]))
    order = jnp.argsort(-jnp.abs(flat), axis=-1, stable=True)
    # Ranks break ties, so that no more of equal values are kept than the share says.
    place = jnp.argsort(order, axis=-1)
    return jnp.where(place < count, flat, 0).reshape(values.shape)


def randomly_kept(values: Values, density: float, key: PRNGKeyArray) -> Values:
    """Returns the values, each kept with this probability and divided by it.

    Source: Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous Models
    as a Free Lunch, 2023, section 3 (DARE, with a drop rate of 1 - density).
    """
    return jnp.where(jax.random.bernoulli(key, density, values.shape), values / density, 0)


def agreeing_mean(values: Values, majority_sign: MajoritySign) -> Merged:
    r"""Returns for each entry the mean over the tasks that have the elected sign.

    The elected sign is the sign of $\sum_t v_t$ (`"total"`) or of $\sum_t \operatorname{sgn} v_t$
    (`"frequency"`). Where that is zero, no sign is elected and the entry is zero.

    Source: Yadav et al. 2023, section 4 (elect, disjoint merge).
    """
    signs = jnp.sign(values)
    votes = {"total": values, "frequency": signs}[majority_sign]
    elected = jnp.sign(jnp.sum(votes, axis=0, keepdims=True))
    agrees = (signs == elected) & (signs != 0)
    count = jnp.maximum(jnp.sum(agrees, axis=0), 1).astype(values.dtype)
    return jnp.sum(jnp.where(agrees, values, 0), axis=0) / count
