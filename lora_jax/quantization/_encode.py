"""Quantising one array: the scale of each block, and the nearest code of each weight."""

import dataclasses
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax._paths import listed
from lora_jax._shapes import Axes, positions
from lora_jax.quantization._formats import FORMATS, Format
from lora_jax.quantization._packing import packed
from lora_jax.quantization._weight import QuantizedWeight

# Blocks of scales that are quantised again. Source: Dettmers et al. 2023, section 3.
_SCALES_IN_BLOCK = 256

_WRITTEN = tuple(name for name, each in FORMATS.items() if each.is_offered)
_DEFAULT_BLOCK = 64


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
    def checked(
        cls,
        subject: str,
        *,
        format: Any = "nf4",  # noqa: A002 - the word of the field
        block: Any = _DEFAULT_BLOCK,
        double_quantize: Any = None,
    ) -> "Encoding":
        """Returns the encoding with these settings, documented at `lora_jax.quantize`.

        Args:
          subject: who has the settings, for errors.
          format: the name of the format.
          block: how many weights share a scale, or None.
          double_quantize: whether the scales are quantised too, or None.

        Raises:
          ValueError: `format` or `block` is none of these.
          TypeError: a setting has the wrong type.
        """
        if format not in _WRITTEN:
            raise ValueError(
                f"{subject} has the format {format!r}; expected one of {listed(_WRITTEN)}."
            )
        if block is not None and (isinstance(block, bool) or not hasattr(block, "__index__")):
            raise TypeError(f"{subject} has the block {block!r}; expected a whole number, or None.")
        if block is not None and operator.index(block) < 1:
            raise ValueError(
                f"{subject} has the block {block}; expected at least 1, or None for one scale for "
                "each output feature."
            )
        if double_quantize is not None and not isinstance(double_quantize, bool):
            raise TypeError(
                f"{subject} has double_quantize={double_quantize!r}; expected True, False or None."
            )
        block = None if block is None else operator.index(block)
        if FORMATS[format].is_float and block == _DEFAULT_BLOCK:
            block = None
        return cls(format, block, format == "nf4" if double_quantize is None else double_quantize)

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "Encoding":
        """Returns how a weight was quantised, for another weight in its place."""
        return cls(weight.format, weight.block, isinstance(weight.scales, QuantizedWeight))


def is_written(weight: QuantizedWeight) -> bool:
    """Says whether weights can be quantised as this one is."""
    has_own_numbers = weight.offsets is not None or weight.codebook is not None
    return weight.format in _WRITTEN and not has_own_numbers


def quantized(
    weight: Array, axes: Axes, encoding: Encoding, *, at_once: bool = False
) -> QuantizedWeight:
    """Returns a weight quantised along its input axes, one batch index after the other.

    So the memory beside the weight and its codes is that of one matrix.

    Args:
      weight: the array; the batch axes that lead it are those of the result.
      axes: the role of each of its axes. A batch axis behind others counts as an output.
      encoding: how.
      at_once: whether to quantise all batch indices at once, as where they are cut over a mesh: one
        after the other, each device would need those of all.
    """
    batch = next(place for place, role in enumerate((*axes, "in")) if role != "batch")
    blocked = positions(axes, "in")
    features = tuple(axis for axis in range(batch, len(axes)) if axis not in blocked)
    return _quantized_along(
        weight, batch, blocked, features, encoding, str(weight.dtype), at_once=at_once
    )


def requantized(weight: Array, like: QuantizedWeight, *, at_once: bool = False) -> QuantizedWeight:
    """Returns an array of a quantised weight's shape, quantised as that one is.

    Args:
      weight: the array; it may be wider than the dtype that the result dequantises to.
      like: the quantised weight, of which only the static fields are read.
      at_once: as for `quantized`.

    Raises:
      ValueError: the format is one that is read from files, and not written.
    """
    if not is_written(like):
        raise ValueError(
            f"A weight of the format {like.format!r}"
            + ("" if like.offsets is None else " with offsets")
            + ("" if like.codebook is None else " with a codebook of its own")
            + " is read from files, and nothing is quantised to it; expected one of the formats "
            f"{listed(_WRITTEN)}. quantization.dequantize(params) makes an array of it."
        )
    ndim = like.ndim
    blocked = tuple(ndim + axis for axis in like.blocked)
    features = tuple(ndim + axis for axis in like.features)
    return _quantized_along(
        weight,
        like.batch_ndim,
        blocked,
        features,
        Encoding.of(like),
        like.dtype_name,
        at_once=at_once,
    )


def _quantized_along(
    weight: Array,
    batch: int,
    blocked: tuple[int, ...],
    features: tuple[int, ...],
    encoding: Encoding,
    dtype_name: str,
    *,
    at_once: bool,
) -> QuantizedWeight:
    """Returns a weight quantised in blocks along the flattened axes `blocked`."""
    in_order = weight.transpose((*range(batch), *blocked, *features))
    front = in_order.shape[:batch]
    blocked_shape = in_order.shape[batch : batch + len(blocked)]
    of_features = in_order.shape[batch + len(blocked) :]
    matrices = in_order.reshape(math.prod(front), math.prod(blocked_shape), *of_features)

    def of_matrix(rows: Array) -> QuantizedWeight:
        return _quantized_rows(rows, encoding)

    one_by_one = batch > 0 and not at_once
    stacked = jax.lax.map(of_matrix, matrices) if one_by_one else jax.vmap(of_matrix)(matrices)
    leaves = jax.tree.map(lambda leaf: leaf.reshape(*front, *leaf.shape[1:]), stacked)
    return dataclasses.replace(
        leaves,
        blocked=tuple(axis - weight.ndim for axis in blocked),
        blocked_shape=blocked_shape,
        features=tuple(axis - weight.ndim for axis in features),
        dtype_name=dtype_name,
    )


def _quantized_rows(rows: Array, encoding: Encoding) -> QuantizedWeight:
    """Returns an array (n, *features) quantised in blocks along its first axis."""
    form = FORMATS[encoding.format]
    rows = rows.astype(jnp.float32)
    count = rows.shape[0]
    blocks = _in_blocks(rows, encoding.block or count)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    # A block of zeros has codes of zero, and no scale is so small that its reciprocal is infinite.
    bounded = jnp.maximum(absmax, form.largest * _SMALLEST)
    inverse = form.largest / bounded
    scaled = (blocks * inverse[:, None]).reshape(-1, *rows.shape[1:])[:count]
    codes = _codes(scaled, form)
    scales = jnp.where(absmax == 0, 0, bounded) / form.largest
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
        return _nearest(scaled, np.asarray(form.levels, np.float32)).astype(jnp.uint8)
    if form.is_float:
        return jax.lax.bitcast_convert_type(scaled.astype(form.dtype), jnp.uint8)
    whole = jnp.clip(jnp.round(scaled), -form.largest, form.largest).astype(jnp.int8)
    return whole.astype(jnp.uint8) & ((1 << form.bits) - 1) if form.is_packed else whole


def _nearest(scaled: Array, levels: np.ndarray) -> Array:
    """Returns the index of the nearest level; the lower one of two that are as near."""
    bounds = (levels[:-1] + levels[1:]) / 2
    if len(levels) > _MOST_COMPARED:
        return jnp.searchsorted(jnp.asarray(bounds), scaled, side="left", method="scan")
    # One comparison after the other fuses: `searchsorted` would hold all of them.
    places = jnp.zeros(scaled.shape, jnp.uint8)
    for bound in bounds:
        places = places + (scaled > bound).astype(jnp.uint8)
    return places


_MOST_COMPARED = 16
