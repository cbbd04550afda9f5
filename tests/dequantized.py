"""What the codes of a quantised weight stand for, in NumPy and float64, from the definitions."""

from typing import Any

import ml_dtypes
import numpy as np

# QLoRA, appendix E: quantiles of N(0, 1), scaled so that the outermost are -1 and 1.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
NF4 += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
NF4 += [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def dynamic_levels() -> np.ndarray:
    """Returns the 256 levels of the 8-bit dynamic format: seven decades of ever more means."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        means = (edges[1:] + edges[:-1]) / 2 / 10.0 ** (6 - decade)
        levels += [*means, *-means]
    return np.sort(levels)


LEVELS = {"nf4": np.array(NF4), "dynamic8": dynamic_levels()}


def dequantized(weight: Any) -> np.ndarray:
    """Returns the value of each weight, rounded to the weight's dtype and no earlier."""
    batch = weight.codes.ndim - 1 - len(weight.features)
    rows = np.moveaxis(np.asarray(weight.codes), batch, -1)
    count = int(np.prod(weight.blocked_shape))
    values = _numbers(weight, rows)[..., :count]
    values = values * _of_each(weight, weight.scales, batch, count)
    if weight.offsets is not None:
        values = values + _of_each(weight, weight.offsets, batch, count)
    # (*batch, *features, *blocked), and where each of these axes belongs.
    values = values.reshape(*values.shape[:-1], *weight.blocked_shape)
    ndim = values.ndim
    places = (*range(batch), *(ndim + axis for axis in (*weight.features, *weight.blocked)))
    return np.moveaxis(values, range(ndim), places).astype(weight.dtype).astype(np.float64)


def _of_each(weight: Any, numbers: Any, batch: int, count: int) -> np.ndarray:
    """Returns the scale or offset of each weight, the weights of a feature on the last axis."""
    if hasattr(numbers, "codes"):
        blocks = dequantized(numbers)
    else:
        blocks = np.moveaxis(np.asarray(numbers, np.float64), batch, -1)
    if blocks.shape[-1] == 1:
        return blocks
    return np.repeat(blocks, weight.block, axis=-1)[..., :count]


def _numbers(weight: Any, rows: np.ndarray) -> np.ndarray:
    if weight.format in ("nf4", "int4", "uint4"):
        rows = np.stack([rows >> 4, rows & 15], axis=-1).reshape(*rows.shape[:-1], -1)
    if weight.format == "int4":
        return (rows.astype(np.int64) ^ 8) - 8.0
    if weight.format == "fp8_e4m3":
        return rows.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    levels = LEVELS.get(weight.format) if weight.codebook is None else weight.codebook
    return rows.astype(np.float64) if levels is None else np.asarray(levels)[rows]
