r"""The blocks of GGUF's quantised tensors, taken apart into codes, scales and offsets.

Along the last axis of a tensor, every 32 weights, or 256 for the "K" types, are one block of bytes:
its scales and then its codes. Codes, scales and offsets stay what they are in the file:

| type | a block | a weight |
| --- | --- | --- |
| Q4_0 | d, 32 q of 4 bits | $d (q - 8)$ |
| Q4_1 | d, m, 32 q of 4 bits | $d q + m$ |
| Q8_0 | d, 32 q of 8 bits, signed | $d q$ |
| Q4_K | d, e, 8 s and 8 m of 6 bits, 256 q of 4 bits | $d s_j q - e m_j$, j one of 8 blocks |
| Q6_K | 256 q of 6 bits, 16 s of 8 bits, signed, d | $d s_j (q - 32)$, j one of 16 blocks |

d, e and Q4_1's m are float16.

Source: ggml-common.h and ggml-quants.c of ggml.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from lora_jax.quantization._weight import QuantizedWeight

Bytes = np.ndarray
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class BlockType:
    r"""A type of quantised tensors.

    Attributes:
      weights: the number of weights of a block.
      size: its size in bytes.
      read: the function from the bytes of all blocks, (\*lead, blocks, size), to the weight.
    """

    weights: int
    size: int
    read: Callable[[Bytes], QuantizedWeight]


def quantized(kind: str, data: Bytes, shape: Shape) -> QuantizedWeight:
    """Returns a tensor of a type of `BLOCK_TYPES`, with its arrays in the host's memory.

    The last axis of the weight is blocked, the one before it is its feature, and what leads these
    are batch axes.

    Args:
      kind: the name of the type.
      data: its bytes, in any shape.
      shape: the shape of the tensor in NumPy's order.
    """
    form = BLOCK_TYPES[kind]
    blocks = data.reshape(*shape[:-1], shape[-1] // form.weights, form.size)
    return form.read(blocks)


def _read_q4_0(blocks: Bytes) -> QuantizedWeight:
    codes = _nibbles(blocks[..., 2:]) ^ 8
    return _weight("int4", codes, block=32, scales=_float16(blocks[..., :2]))


def _read_q4_1(blocks: Bytes) -> QuantizedWeight:
    scales, offsets = _float16(blocks[..., :2]), _float16(blocks[..., 2:4])
    return _weight("uint4", _nibbles(blocks[..., 4:]), block=32, scales=scales, offsets=offsets)


def _read_q8_0(blocks: Bytes) -> QuantizedWeight:
    codes = blocks[..., 2:].view(np.int8)
    return _weight("int8", codes, block=32, scales=_float16(blocks[..., :2]))


def _read_q4_k(blocks: Bytes) -> QuantizedWeight:
    outer, outer_offset = _float16(blocks[..., :2]), _float16(blocks[..., 2:4])
    # Twelve bytes: the lower six bits of four scales, of four offsets, and the lower four bits of
    # the other four of both; the two upper bits of the latter are those of the former bytes.
    first, second, third = np.split(blocks[..., 4:16], 3, axis=-1)
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=-1)
    offsets = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=-1)
    return _weight(
        "uint4",
        _nibbles(blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)),
        block=32,
        scales=_weight("uint6", scales, block=8, scales=outer),
        offsets=_weight("uint6", offsets, block=8, scales=-outer_offset),
    )


def _read_q6_k(blocks: Bytes) -> QuantizedWeight:
    lead = blocks.shape[:-1]
    # Each half of a block: the lower four bits in 64 bytes, and the upper two in 32.
    lower = _nibbles(blocks[..., :128].reshape(*lead, 2, 64)).reshape(*lead, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    upper = (blocks[..., 128:192].reshape(*lead, 2, 1, 32) >> shifts) & 3
    scales = blocks[..., 192:208].view(np.int8)
    return _weight(
        "int6",
        (lower | (upper << 4)) ^ 32,
        block=16,
        scales=_weight("int8", scales, block=16, scales=_float16(blocks[..., 208:])),
    )


BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "Q4_0": BlockType(32, 18, _read_q4_0),
        "Q4_1": BlockType(32, 20, _read_q4_1),
        "Q8_0": BlockType(32, 34, _read_q8_0),
        "Q4_K": BlockType(256, 144, _read_q4_k),
        "Q6_K": BlockType(256, 210, _read_q6_k),
    }
)

_BITS = {"int4": 4, "uint4": 4, "int6": 6, "uint6": 6}


def _weight(
    name: str, codes: Bytes, *, block: int, scales: Any, offsets: Any = None
) -> QuantizedWeight:
    r"""Returns a weight of codes (\*lead, blocks, ...), each row of which `blocks, ...` are."""
    lead = scales.shape[:-1] if isinstance(scales, QuantizedWeight) else scales.shape[:-2]
    rows = codes.reshape(*lead, -1)
    return QuantizedWeight(
        codes=_features_last(_packed(rows, _BITS[name]) if name in _BITS else rows),
        scales=_numbers(scales, lead),
        offsets=_numbers(offsets, lead),
        format=name,
        block=block,
        blocked=(-1,),
        blocked_shape=(rows.shape[-1],),
        features=(-2,) if lead else (),
    )


def _numbers(numbers: Any, lead: Shape) -> Any:
    r"""Returns scales or offsets of shape (\*lead, blocks, 1) as a weight has them."""
    if numbers is None or isinstance(numbers, QuantizedWeight):
        return numbers
    return _features_last(numbers.reshape(*lead, -1))


def _features_last(rows: Bytes) -> Bytes:
    r"""Returns (\*batch, feature, n) as (\*batch, n, feature), in memory of its own."""
    return np.array(rows if rows.ndim < 2 else rows.swapaxes(-1, -2), order="C")


def _nibbles(data: Bytes) -> Bytes:
    """Returns the lower halves of the bytes along the last axis, and after them the upper ones."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _float16(data: Bytes) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.float16)


def _packed(codes: Bytes, bits: int) -> Bytes:
    """Returns codes in bytes along the last axis as `quantization._packing` has them."""
    if bits == 4:
        return (codes[..., 0::2] << 4) | codes[..., 1::2]
    first, second, third, fourth = (codes[..., place::4] for place in range(4))
    parts = [(first << 2) | (second >> 4), (second << 4) | (third >> 2), (third << 6) | fourth]
    return np.stack(parts, axis=-1).reshape(*codes.shape[:-1], -1)
