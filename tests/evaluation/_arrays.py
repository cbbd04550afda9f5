"""Ops that move, cut, join and reduce arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def _broadcast(x: np.ndarray, *, shape: Any, broadcast_dimensions: Any, **_: Any) -> np.ndarray:
    sizes = [1] * len(shape)
    for axis, place in enumerate(broadcast_dimensions):
        sizes[place] = x.shape[axis]
    return np.broadcast_to(x.reshape(sizes), shape)


def _sliced(
    x: np.ndarray, *, start_indices: Any, limit_indices: Any, strides: Any, **_: Any
) -> np.ndarray:
    strides = strides or (1,) * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, strides))]


def _clamped(starts: Sequence[Any], sizes: Sequence[int], shape: Sequence[int]) -> tuple[Any, ...]:
    first = [
        min(max(int(start), 0), whole - size)
        for start, size, whole in zip(starts, sizes, shape, strict=True)
    ]
    return tuple(slice(start, start + size) for start, size in zip(first, sizes, strict=True))


def _dynamic_slice(x: np.ndarray, *starts: Any, slice_sizes: Any, **_: Any) -> np.ndarray:
    return x[_clamped(starts, slice_sizes, x.shape)]


def _dynamic_update(x: np.ndarray, update: np.ndarray, *starts: Any, **_: Any) -> np.ndarray:
    result = np.array(x)
    result[_clamped(starts, update.shape, x.shape)] = update
    return result


def _padded(x: np.ndarray, value: np.ndarray, *, padding_config: Any, **_: Any) -> np.ndarray:
    return padded(x, value, padding_config)


def padded(x: np.ndarray, value: Any, config: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Returns an array with (low, high, interior) padding; negative widths cut."""
    inner = [
        size + max(size - 1, 0) * gap for size, (_, _, gap) in zip(x.shape, config, strict=True)
    ]
    spread = np.full(inner, value, x.dtype)
    spread[tuple(slice(None, None, gap + 1) for _, _, gap in config)] = x
    outside = [(max(low, 0), max(high, 0)) for low, high, _ in config]
    whole = np.pad(spread, outside, constant_values=np.asarray(value, x.dtype))
    cuts = [
        slice(max(-low, 0), whole.shape[axis] - max(-high, 0))
        for axis, (low, high, _) in enumerate(config)
    ]
    return whole[tuple(cuts)]


def _reshaped(x: np.ndarray, *, new_sizes: Any, dimensions: Any, **_: Any) -> np.ndarray:
    return np.reshape(x if dimensions is None else x.transpose(dimensions), new_sizes)


def _split(x: np.ndarray, *, sizes: Any, axis: int, **_: Any) -> list[np.ndarray]:
    return np.split(x, np.cumsum(sizes)[:-1], axis=axis)


def _iota(*, dtype: Any, shape: Any, dimension: int, **_: Any) -> np.ndarray:
    sizes = [1] * len(shape)
    sizes[dimension] = shape[dimension]
    return np.broadcast_to(np.arange(shape[dimension]).astype(dtype).reshape(sizes), shape)


def _summed(x: np.ndarray, axes: Any) -> np.ndarray:
    wide = np.float32 if x.dtype.kind == "V" or x.dtype.itemsize == 2 else x.dtype
    return np.sum(x.astype(wide), axis=tuple(axes)).astype(x.dtype)


def _running_sum(x: np.ndarray, *, axis: int, reverse: bool, **_: Any) -> np.ndarray:
    wide = x.astype(np.float32) if x.dtype.itemsize == 2 else x
    total = (
        np.flip(np.cumsum(np.flip(wide, axis), axis), axis) if reverse else np.cumsum(wide, axis)
    )
    return total.astype(x.dtype)


ARRAYS = {
    "argmax": lambda x, *, axes, index_dtype, **_: np.argmax(x, axes[0]).astype(index_dtype),
    "argmin": lambda x, *, axes, index_dtype, **_: np.argmin(x, axes[0]).astype(index_dtype),
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda *xs, dimension, **_: np.concatenate(xs, dimension),
    "cumsum": _running_sum,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "empty2": lambda *, dtype, **_: np.zeros((), dtype),
    "expand_dims": lambda x, *, dimensions, **_: np.expand_dims(x, dimensions),
    "iota": _iota,
    "pad": _padded,
    "reduce_and": lambda x, *, axes, **_: np.all(x, axis=tuple(axes)),
    "reduce_max": lambda x, *, axes, **_: np.max(x, axis=tuple(axes)),
    "reduce_min": lambda x, *, axes, **_: np.min(x, axis=tuple(axes)),
    "reduce_or": lambda x, *, axes, **_: np.any(x, axis=tuple(axes)),
    "reduce_sum": lambda x, *, axes, **_: _summed(x, axes),
    "reshape": _reshaped,
    "rev": lambda x, *, dimensions, **_: np.flip(x, dimensions),
    "slice": _sliced,
    "split": _split,
    "squeeze": lambda x, *, dimensions, **_: np.squeeze(x, tuple(dimensions)),
    "stack": lambda *xs, axis, **_: np.stack(xs, axis),
    "tile": lambda x, *, reps, **_: np.tile(x, reps),
    "transpose": lambda x, *, permutation, **_: np.transpose(x, permutation),
    "unstack": lambda x, *, axis, **_: list(np.moveaxis(x, axis, 0)),
}
