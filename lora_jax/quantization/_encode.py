"""Quantising one array: the scale of each block, and the nearest code of each weight."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax._shapes import Axes, positions
from lora_jax.quantization._formats import FORMATS, Format
from lora_jax.quantization._packing import packed
from lora_jax.quantization._weight import QuantizedWeight

# Blocks of scales that are quantised again. Source: Dettmers et al. 2023, section 3.
_SCALES_IN_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a weight is quantised.

    Attributes:
      format: the name of the format.
      block: how many neighbours along the input axes share a scale; None for all of them.
      double: whether the scales are quantised too.
    """

    format: str
    block: int | None
    double: bool

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "Encoding":
        """Returns how a weight was quantised, for another weight in its place."""
        return cls(weight.format, weight.block, isinstance(weight.scales, QuantizedWeight))


def quantized(weight: Array, axes: Axes, encoding: Encoding) -> QuantizedWeight:
    """Returns a weight quantised along its input axes, one batch index after the other.

    So the memory beside the weight and its codes is that of one matrix.

    Args:
      weight: the array; the batch axes that lead it are those of the result.
      axes: the role of each of its axes. A batch axis behind others counts as an output.
      encoding: how.
    """
    batch = next(place for place, role in enumerate((*axes, "in")) if role != "batch")
    blocked = positions(axes, "in")
    features = tuple(axis for axis in range(batch, len(axes)) if axis not in blocked)
    return _quantized_along(weight, batch, blocked, features, encoding)


def requantized(weight: Array, like: QuantizedWeight) -> QuantizedWeight:
    """Returns an array of a quantised weight's shape, quantised as that one is.

    Raises:
      ValueError: that one is of a file, in a format that weights are not quantised to here.
    """
    if not FORMATS[like.format].is_offered or like.codebook is not None or like.offsets is not None:
        raise ValueError(
            f"An initialiser changes the base, whose codes in {like.format} have the offsets or "
            "levels of a file, which lora_jax quantises nothing to; expected one that keeps it, "
            "such as 'kaiming', or quantization.dequantize(params)."
        )
    ndim = like.ndim
    blocked = tuple(ndim + axis for axis in like.blocked)
    features = tuple(ndim + axis for axis in like.features)
    return _quantized_along(weight, like.batch_ndim, blocked, features, Encoding.of(like))


def _quantized_along(
    weight: Array,
    batch: int,
    blocked: tuple[int, ...],
    features: tuple[int, ...],
    encoding: Encoding,
) -> QuantizedWeight:
    """Returns a weight quantised in blocks along the flattened axes `blocked`."""
    in_order = weight.transpose((*range(batch), *blocked, *features))
    front = in_order.shape[:batch]
    blocked_shape = in_order.shape[batch : batch + len(blocked)]
    of_features = in_order.shape[batch + len(blocked) :]
    matrices = in_order.reshape(math.prod(front), math.prod(blocked_shape), *of_features)

    def of_matrix(rows: Array) -> QuantizedWeight:
        return _quantized_rows(rows, encoding)

    stacked = jax.lax.map(of_matrix, matrices) if batch else jax.vmap(of_matrix)(matrices)
    leaves = jax.tree.map(lambda leaf: leaf.reshape(*front, *leaf.shape[1:]), stacked)
    return dataclasses.replace(
        leaves,
        blocked=tuple(axis - weight.ndim for axis in blocked),
        blocked_shape=blocked_shape,
        features=tuple(axis - weight.ndim for axis in features),
        dtype_name=str(weight.dtype),
    )


def _quantized_rows(rows: Array, encoding: Encoding) -> QuantizedWeight:
    """Returns an array (n, *features) quantised in blocks along its first axis."""
    form = FORMATS[encoding.format]
    rows = rows.astype(jnp.float32)
    count = rows.shape[0]
    blocks = _in_blocks(rows, encoding.block or count)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    # A block of zeros has codes of zero; the reciprocal of the smallest normal number is finite.
    inverse = form.largest / jnp.maximum(absmax, _SMALLEST)
    scaled = (blocks * inverse[:, None]).reshape(-1, *rows.shape[1:])[:count]
    codes = _codes(scaled, form)
    scales = absmax / form.largest
    return QuantizedWeight(
        codes=packed(codes, form.bits, 0) if form.is_packed else codes,
        scales=_double(scales) if encoding.double else scales,
        format=encoding.format,
        block=encoding.block,
        blocked=(-rows.ndim,),
        blocked_shape=(count,),
        features=tuple(range(1 - rows.ndim, 0)),
    )


_SMALLEST = 1e-37


def _double(of_blocks: Array) -> QuantizedWeight:
    """Returns the scales of the blocks quantised to 8 bits, with their mean taken out.

    Source: Dettmers et al. 2023, section 3, "Double Quantization".
    """
    scales = jnp.moveaxis(of_blocks, 0, -1)
    mean = jnp.mean(scales)
    flat = (scales - mean).reshape(-1)
    found = _quantized_rows(flat, Encoding("dynamic8", _SCALES_IN_BLOCK, double=False))
    return dataclasses.replace(
        found,
        offsets=mean.reshape(1),
        blocked=tuple(range(-scales.ndim, 0)),
        blocked_shape=tuple(scales.shape),
        features=(),
    )


def _in_blocks(rows: Array, block: int) -> Array:
    """Returns an array as (blocks, block, *features), the last block filled with zeros."""
    padding = [(0, -rows.shape[0] % block)] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(-1, block, *rows.shape[1:])


def _codes(scaled: Array, form: Format) -> Array:
    """Returns the code of the number that is nearest to each scaled weight."""
    if form.levels is not None:
        return _nearest(scaled, form.levels).astype(jnp.uint8)
    if form.is_float:
        return scaled.astype(form.dtype)
    whole = jnp.clip(jnp.round(scaled), -form.largest, form.largest).astype(jnp.int8)
    return whole.astype(jnp.uint8) & ((1 << form.bits) - 1) if form.is_packed else whole


def _nearest(scaled: Array, levels: Sequence[float]) -> Array:
    """Returns the index of the nearest level; the lower one of two that are as near."""
    known = np.asarray(levels, np.float32)
    bounds = jnp.asarray((known[:-1] + known[1:]) / 2)
    # Comparing with each bound vectorises; with many bounds it would take their number in memory.
    method = "compare_all" if len(levels) <= _MOST_COMPARED else "scan"
    return jnp.searchsorted(bounds, scaled, side="left", method=method)


_MOST_COMPARED = 16
