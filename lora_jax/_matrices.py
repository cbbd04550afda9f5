"""Computing with a weight matrix by matrix, where it is a stack of quantised ones.

What is computed from a dequantised stack would hold all of it: here one matrix is dequantised after
the other.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lora_jax._partition import Partition
from lora_jax._shapes import Axes, Layers, taken_layers, with_layers
from lora_jax.quantization._weight import QuantizedWeight, is_quantized


def stack_ndim(base: Any, axes: Axes) -> int:
    """Returns how many leading axes to go through; 0 for an array, and for a single matrix.

    Also for a stack that is cut over a mesh along such an axis: each device has a part of it, and
    works on that alone.
    """
    if not is_quantized(base):
        return 0
    leading = next(place for place, role in enumerate((*axes, "end")) if role != "batch")
    count = min(leading, base.batch_ndim)
    partition = Partition.of(base)
    is_cut = partition is not None and any(cut is not None for cut in partition.cuts[:count])
    return 0 if is_cut else count


def by_matrix(
    function: Callable[..., Any],
    stack: int,
    base: Any,
    axes: Axes,
    layers: Layers | None,
    *arrays: Any,
) -> Any:
    """Returns `function(part, *arrays)`, where `part` is what `layers` selects, as an array.

    Args:
      function: it is called with leading axes of size 1, once for each matrix of a stack.
      stack: what `stack_ndim` returns.
      base: the weight, an array or quantised.
      axes: the role of each of its axes.
      layers: the adapted indices of its first batch axis, or None.
      *arrays: arrays that have the leading axes of the part, or None. So have the results.
    """
    if not stack:
        whole = base.dequantize() if is_quantized(base) else base
        return function(taken_layers(whole, axes, layers), *arrays)
    part = base if layers is None else jax.tree.map(lambda leaf: leaf[np.array(layers)], base)
    front = part.shape[:stack]

    def of_one(parts: Any) -> Any:
        one, *others = jax.tree.map(lambda leaf: leaf.reshape((1,) * stack + leaf.shape), parts)
        found = function(one.dequantize(), *others)
        return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[stack:]), found)

    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[stack:]), (part, *arrays))
    stacked = jax.lax.map(of_one, flat)
    return jax.tree.map(lambda leaf: leaf.reshape(*front, *leaf.shape[1:]), stacked)


def with_quantized_layers(
    base: QuantizedWeight, part: QuantizedWeight, layers: Layers | None
) -> QuantizedWeight:
    """Returns a quantised stack with `part` in place of the layers that it holds."""
    if layers is None:
        return part
    return jax.tree.map(lambda leaf, new: with_layers(leaf, new, ("batch",), layers), base, part)
