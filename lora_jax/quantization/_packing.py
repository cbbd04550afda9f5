"""Codes of fewer than eight bits, packed into bytes along one axis.

Neighbours along the axis share bytes, the first in the highest bits: two codes of four bits in one
byte, four codes of six bits in three. So a part of the axis is a part of the bytes, wherever it is
cut between whole groups.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array


def group_of(bits: int) -> tuple[int, int]:
    """Returns how many codes share how many bytes."""
    common = math.lcm(bits, 8)
    return common // bits, common // 8


def packed(codes: Array, bits: int, axis: int) -> Array:
    """Returns codes of the given width in bytes along an axis, the last group filled with zeros.

    Args:
      codes: codes in the lowest bits of uint8.
      bits: the width of a code.
      axis: the axis along which neighbours share bytes.
    """
    count, width = group_of(bits)
    size = codes.shape[axis]
    padding = [(0, 0)] * codes.ndim
    padding[axis] = (0, -size % count)
    groups = _grouped(jnp.pad(codes, padding), count, axis)
    word = jnp.zeros((), jnp.uint32)
    for place in range(count):
        part = groups.take(place, axis=axis + 1).astype(jnp.uint32)
        word = word | (part << (bits * (count - 1 - place)))
    parts = [(word >> (8 * (width - 1 - place))) & 0xFF for place in range(width)]
    return _joined(jnp.stack(parts, axis=axis + 1), axis).astype(jnp.uint8)


def unpacked(packed_codes: Array, bits: int, axis: int, size: int) -> Array:
    """Returns the codes in bytes of their own, the first `size` along the axis.

    Args:
      packed_codes: what `packed` returned.
      bits: the width of a code.
      axis: the axis along which neighbours share bytes.
      size: the number of codes along the axis.
    """
    count, width = group_of(bits)
    mask = (1 << bits) - 1
    if width == 1:
        word = packed_codes
    else:
        groups = _grouped(packed_codes, width, axis).astype(jnp.uint32)
        word = jnp.zeros((), jnp.uint32)
        for place in range(width):
            word = word | (groups.take(place, axis=axis + 1) << (8 * (width - 1 - place)))
    shifts = (bits * (count - 1 - place) for place in range(count))
    parts = [(word >> shift) & mask for shift in shifts]
    # Stacked, and not shifted as one broadcast array: XLA's partitioner takes how an array is cut
    # forward through a broadcast, but only once it has found how products are cut. Where
    # activations cut these over the same axis of the mesh, it would gather dequantised weights.
    codes = jnp.stack(parts, axis=axis + 1).astype(jnp.uint8)
    codes = _joined(codes, axis)
    return codes[(slice(None),) * axis + (slice(size),)] if codes.shape[axis] != size else codes


def _grouped(array: Array, count: int, axis: int) -> Array:
    shape = array.shape
    return array.reshape(*shape[:axis], shape[axis] // count, count, *shape[axis + 1 :])


def _joined(array: Array, axis: int) -> Array:
    shape = array.shape
    return array.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
