r"""Relative positions: each head adds a number to a score, by the distance of query and key.

Distances share a number by buckets. With n of them for a direction, of which half are for one
distance each, the bucket of a distance d from n/2 on is

$$\min\Big(n - 1,\; \frac n2 + \Big\lfloor \frac{\log(2d/n)}{\log(2m/n)} \cdot \frac n2
\Big\rfloor\Big),$$

where m is the distance from which on all share one. An encoder has half of the buckets for each
direction; a decoder sees none behind the query.

Source: Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer, 2020, section 2.1; transformers, `T5Attention._relative_position_bucket`.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.models.attention import Bias, Places
from experiments.models.t5.config import T5Config

# What each head adds for each difference of positions from -m to m.
ByDifference = Float[Array, "differences heads"]


def buckets(config: T5Config, *, both_directions: bool) -> Int[np.ndarray, " differences"]:
    """Returns the bucket of each difference -m, ..., m of a key's and a query's position.

    It is computed in float32, as transformers does, on which some distances depend.

    Args:
      config: the settings.
      both_directions: whether a query sees what is behind it too.
    """
    farthest = config.relative_attention_max_distance
    differences = np.arange(-farthest, farthest + 1)
    count = config.relative_attention_num_buckets
    if both_directions:
        count //= 2
        first, distances = count * (differences > 0), np.abs(differences)
    else:
        first, distances = 0, np.maximum(-differences, 0)
    exact = count // 2
    ratios = np.maximum(distances, 1).astype(np.float32) / np.float32(exact)
    parts = np.log(ratios) / np.float32(math.log(farthest / exact)) * np.float32(count - exact)
    far = np.minimum(exact + parts.astype(np.int32), count - 1)
    return (first + np.where(distances < exact, distances, far)).astype(np.int32)


def bias_of(by_difference: ByDifference) -> Bias:
    """Returns the function that gives what is added to each score."""
    farthest = len(by_difference) // 2

    def bias(queries: Places, keys: Places) -> Float[Array, "batch heads queries keys"]:
        differences = keys.positions[:, None, :] - queries.positions[:, :, None]
        rows = jnp.clip(differences, -farthest, farthest) + farthest
        return jnp.moveaxis(by_difference[rows], -1, 1)

    return bias
