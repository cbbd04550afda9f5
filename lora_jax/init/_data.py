"""Initialisers that use data."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from lora_jax._paths import listed, nearest_paths
from lora_jax._shapes import Axes, Layers, side_size, sizes, taken_layers, to_matrices
from lora_jax.init._moments import InputMoments
from lora_jax.init._protocol import Frozen

DataFunction = Callable[
    [PRNGKeyArray, Array, int, float, Any], tuple[Array, Array | Frozen, Array | Frozen]
]


@dataclasses.dataclass(frozen=True, eq=False)
class DataInitializer:
    """An initialiser with statistics of each weight, such as moments of its inputs.

    `wrap` takes it for `init=` like a function. It maps the statistics over a weight's matrices
    together with the matrices.

    Attributes:
      function: `(key, weight2d, rank, scale, statistics) -> (base, lora_A, lora_B)`, an
        `Initializer` with one more argument: the statistics of this matrix.
      statistics: for each path of a weight a pytree of arrays, each with a leading axis as long as
        the weight has matrices (the product of its batch axes, or 1).
      shaped_as_weights: whether the statistics of a weight are one array of the weight's own shape
        instead, such as a gradient.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> def rows_seen(key, weight2d, rank, scale, row):
      ...     lora_A = jnp.tile(row[:, None], rank)
      ...     return weight2d, lora_A, jnp.zeros((rank, weight2d.shape[1]))
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> init = DataInitializer(rows_seen, {"kernel": jnp.array([[5.0, 7.0]])})
      >>> lora_jax.wrap(params, "kernel", rank=1, init=init)["kernel"].lora_A.ravel().tolist()
      [5.0, 7.0]
    """

    function: DataFunction
    statistics: Mapping[str, Any]
    shaped_as_weights: bool = dataclasses.field(default=False, kw_only=True)

    def statistics_of(self, path: str, shape: tuple[int, ...], axes: Axes) -> Any:
        """Returns the statistics of a weight.

        Args:
          path: the weight's path.
          shape: its shape.
          axes: the role of each of its axes.

        Raises:
          ValueError: there are none, or their number differs from the weight's matrices.
        """
        if path not in self.statistics:
            raise ValueError(
                f"`init` has no statistics of '{path}'; the nearest paths that it has are "
                f"{listed(nearest_paths(path, self.statistics))}. Gather them from these `params`, "
                "or leave the weight out of `targets`."
            )
        statistics = self.statistics[path]
        if self.shaped_as_weights:
            if jnp.shape(statistics) != shape:
                raise ValueError(
                    f"`init` has statistics of shape {jnp.shape(statistics)} for '{path}'; "
                    f"expected {shape}, the weight's own. Gather them from these `params`."
                )
            return statistics
        matrices = side_size(shape, axes, "batch")
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(statistics)]
        if any(leaf_shape[:1] != (matrices,) for leaf_shape in shapes):
            raise ValueError(
                f"`init` has statistics of the shapes {shapes} for '{path}' of shape {shape} with "
                f"the axes {axes}; expected a leading axis of {matrices} in each. Gather them with "
                "the `axes` that wrap is given."
            )
        return statistics


def per_matrix(
    statistics: Any,
    shape: tuple[int, ...],
    axes: Axes,
    layers: Layers | None,
    *,
    shaped_as_weights: bool,
) -> Any:
    """Returns statistics with a leading axis of the matrices of a weight that are adapted.

    Args:
      statistics: what `statistics_of` returns.
      shape: the weight's shape.
      axes: the role of each of its axes.
      layers: the adapted indices of its first batch axis, or None for all.
      shaped_as_weights: as for `DataInitializer`.
    """
    if shaped_as_weights:
        return to_matrices(taken_layers(jnp.asarray(statistics), axes, layers), axes)
    if layers is None:
        return statistics
    batch = sizes(shape, axes, "batch")
    places = np.arange(math.prod(batch)).reshape(batch)[list(layers)].ravel()
    return jax.tree.map(lambda array: array[places], statistics)


def moments_per_matrix(moments: Mapping[str, InputMoments]) -> dict[str, InputMoments]:
    """Returns `moments` with a count for each matrix, as statistics of a `DataInitializer`.

    Raises:
      TypeError: `moments` is not a mapping from path to `InputMoments`.
    """
    if not isinstance(moments, Mapping):
        raise TypeError(
            f"`moments` is {moments!r}; expected a mapping from path to lora_jax.init.InputMoments."
        )
    for path, value in moments.items():
        if not isinstance(value, InputMoments):
            raise TypeError(
                f"`moments` has {type(value).__name__} for '{path}'; expected a "
                "lora_jax.init.InputMoments."
            )
    return {
        path: dataclasses.replace(
            value, count=jnp.broadcast_to(jnp.asarray(value.count), value.first.shape[:1])
        )
        for path, value in moments.items()
    }


def second_moment(moments: InputMoments, weight2d: Array, dtype: Any) -> Array:
    """Returns the second moment of one matrix's inputs in `dtype`.

    Raises:
      ValueError: its shape does not fit this matrix's inputs.
    """
    inputs = weight2d.shape[0]
    if moments.second.shape != (inputs, inputs):
        raise ValueError(
            f"`moments` holds a second moment of shape {moments.second.shape} for a weight that is "
            f"{weight2d.shape} as a matrix (in, out); expected {(inputs, inputs)}. Gather them "
            "with the `axes` that wrap is given."
        )
    return moments.second.astype(dtype)
