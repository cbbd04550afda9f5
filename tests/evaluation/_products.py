"""Contractions and convolutions."""

from typing import Any

import numpy as np

from tests.evaluation._arrays import padded


def _wide(x: Any) -> np.ndarray:
    """Returns an array in a dtype in which NumPy multiplies, and sums without rounding to it."""
    x = np.asarray(x)
    return (
        x if x.dtype in (np.float32, np.float64) or x.dtype.kind in "iu" else x.astype(np.float32)
    )


def _result_dtype(lhs: Any, rhs: Any, preferred: Any) -> Any:
    return preferred or np.result_type(lhs.dtype, rhs.dtype)


def _dot_general(
    lhs: np.ndarray,
    rhs: np.ndarray,
    *,
    dimension_numbers: Any,
    preferred_element_type: Any,
    **_: Any,
) -> np.ndarray:
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    lhs_labels = list(range(lhs.ndim))
    rhs_labels = list(range(lhs.ndim, lhs.ndim + rhs.ndim))
    for a, b in zip((*lhs_contracted, *lhs_batch), (*rhs_contracted, *rhs_batch), strict=True):
        rhs_labels[b] = lhs_labels[a]
    output = [lhs_labels[axis] for axis in lhs_batch]
    output += [x for axis, x in enumerate(lhs_labels) if axis not in (*lhs_batch, *lhs_contracted)]
    output += [x for axis, x in enumerate(rhs_labels) if axis not in (*rhs_batch, *rhs_contracted)]
    result = np.einsum(_wide(lhs), lhs_labels, _wide(rhs), rhs_labels, output)
    return result.astype(_result_dtype(lhs, rhs, preferred_element_type))


def _ragged_dot_general(
    lhs: np.ndarray,
    rhs: np.ndarray,
    sizes: np.ndarray,
    *,
    ragged_dot_dimension_numbers: Any,
    preferred_element_type: Any,
    **_: Any,
) -> np.ndarray:
    """Splits the ragged axis of lhs into groups, each with its own part of rhs or of the result."""
    numbers = ragged_dot_dimension_numbers
    (lhs_contracted, _), (lhs_batch, _) = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    assert not lhs_batch
    ends = np.cumsum(sizes)
    dtype = _result_dtype(lhs, rhs, preferred_element_type)

    def part(x: np.ndarray, axis: int, group: int) -> np.ndarray:
        return np.take(x, range(ends[group] - sizes[group], ends[group]), axis)

    def product(a: np.ndarray, b: np.ndarray, dimensions: Any) -> np.ndarray:
        return _dot_general(a, b, dimension_numbers=dimensions, preferred_element_type=dtype)

    if ragged in lhs_contracted:
        (lhs_axes, rhs_axes), batch = numbers.dot_dimension_numbers
        other = rhs_axes[list(lhs_axes).index(ragged)]
        groups = [
            product(part(lhs, ragged, i), part(rhs, other, i), ((lhs_axes, rhs_axes), batch))
            for i in range(len(sizes))
        ]
        return np.stack(groups)
    (group_axis,) = numbers.rhs_group_dimensions
    (lhs_axes, rhs_axes), batch = numbers.dot_dimension_numbers
    dimensions = (lhs_axes, [axis - (axis > group_axis) for axis in rhs_axes]), batch
    free = [axis for axis in range(lhs.ndim) if axis not in lhs_axes]
    groups = [
        product(part(lhs, ragged, i), np.take(rhs, i, group_axis), dimensions)
        for i in range(len(sizes))
    ]
    joined = np.concatenate(groups, free.index(ragged))
    rest = [(0, 0)] * joined.ndim
    rest[free.index(ragged)] = (0, lhs.shape[ragged] - joined.shape[free.index(ragged)])
    return np.pad(joined, rest)


def _convolution(
    lhs: np.ndarray,
    rhs: np.ndarray,
    *,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    preferred_element_type: Any,
    **_: Any,
) -> np.ndarray:
    dtype = _result_dtype(lhs, rhs, preferred_element_type)
    x = _wide(lhs).transpose(dimension_numbers.lhs_spec)
    kernel = _wide(rhs).transpose(dimension_numbers.rhs_spec)
    space = [(low, high, gap - 1) for (low, high), gap in zip(padding, lhs_dilation, strict=True)]
    x = padded(x, 0, [(0, 0, 0), (0, 0, 0), *space])
    kernel = padded(kernel, 0, [(0, 0, 0), (0, 0, 0), *((0, 0, gap - 1) for gap in rhs_dilation)])
    spatial = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], spatial)
    windows = windows[
        (slice(None), slice(None), *(slice(None, None, step) for step in window_strides))
    ]
    groups = feature_group_count * batch_group_count
    kernels = np.split(kernel, groups)
    inputs = (
        np.split(windows, feature_group_count, 1)
        if feature_group_count > 1
        else np.split(windows, batch_group_count, 0)
    )
    count = len(spatial)
    x_labels = list(range(2 + 2 * count))
    kernel_labels = [2 + 2 * count, 1, *range(2 + count, 2 + 2 * count)]
    output = [0, 2 + 2 * count, *range(2, 2 + count)]
    parts = [
        np.einsum(each, x_labels, part, kernel_labels, output)
        for each, part in zip(inputs, kernels, strict=True)
    ]
    result = np.concatenate(parts, 1).astype(dtype)
    return result.transpose(np.argsort(dimension_numbers.out_spec))


PRODUCTS = {
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
}
