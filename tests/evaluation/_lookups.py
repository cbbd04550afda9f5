"""Gather and scatter."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode


def _places(
    shape: Sequence[int],
    indices: np.ndarray,
    sizes: Sequence[int],
    index_map: Sequence[int],
    operand_batch: Sequence[int],
    indices_batch: Sequence[int],
    mode: Any,
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Returns, for each axis of the operand, the places of each slice's elements, and which count.

    Both have the axes of the indices without the last, and then all axes of a slice.
    """
    batch = indices.shape[:-1]
    starts = [np.zeros(batch, np.int64) for _ in shape]
    for column, axis in enumerate(index_map):
        starts[axis] = indices[..., column].astype(np.int64)
    for axis, place in zip(operand_batch, indices_batch, strict=True):
        sizes_of_iota = [1] * len(batch)
        sizes_of_iota[place] = batch[place]
        starts[axis] = np.broadcast_to(np.arange(batch[place]).reshape(sizes_of_iota), batch)
    last = [whole - size for whole, size in zip(shape, sizes, strict=True)]
    inside = np.all(
        [(start >= 0) & (start <= end) for start, end in zip(starts, last, strict=True)], axis=0
    )
    if mode == GatherScatterMode.CLIP:
        inside = np.ones_like(inside)
    starts = [np.clip(start, 0, end) for start, end in zip(starts, last, strict=True)]
    places = []
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        offsets = np.arange(size).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        places.append(start.reshape(*batch, *(1,) * len(shape)) + offsets)
    return tuple(np.broadcast_arrays(*places)), inside.reshape(*batch, *(1,) * len(shape))


def _gather(
    operand: np.ndarray,
    indices: np.ndarray,
    *,
    dimension_numbers: Any,
    slice_sizes: Any,
    mode: Any,
    fill_value: Any,
    **_: Any,
) -> np.ndarray:
    numbers = dimension_numbers
    places, inside = _places(
        operand.shape,
        indices,
        slice_sizes,
        numbers.start_index_map,
        numbers.operand_batching_dims,
        numbers.start_indices_batching_dims,
        mode,
    )
    picked = operand[places]
    if mode == GatherScatterMode.FILL_OR_DROP:
        fill = np.nan if fill_value is None and operand.dtype.kind != "i" else fill_value or 0
        picked = np.where(inside, picked, np.asarray(fill).astype(operand.dtype))
    count = indices.ndim - 1
    removed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    picked = picked.squeeze(tuple(count + axis for axis in removed))
    return _with_offsets_at(picked, count, numbers.offset_dims)


def _with_offsets_at(picked: np.ndarray, count: int, offset_dims: Sequence[int]) -> np.ndarray:
    """Returns an array of batch axes and then slice axes with the latter at their places."""
    return np.moveaxis(picked, range(count, picked.ndim), offset_dims)


def _scattered(add: bool) -> Any:
    def scatter(
        operand: np.ndarray,
        indices: np.ndarray,
        updates: np.ndarray,
        *,
        dimension_numbers: Any,
        mode: Any,
        **_: Any,
    ) -> np.ndarray:
        numbers = dimension_numbers
        count = indices.ndim - 1
        removed = sorted((*numbers.inserted_window_dims, *numbers.operand_batching_dims))
        slices = np.moveaxis(updates, numbers.update_window_dims, range(count, updates.ndim))
        slices = np.expand_dims(slices, tuple(count + axis for axis in removed))
        places, inside = _places(
            operand.shape,
            indices,
            slices.shape[count:],
            numbers.scatter_dims_to_operand_dims,
            numbers.operand_batching_dims,
            numbers.scatter_indices_batching_dims,
            mode,
        )
        counted = np.broadcast_to(inside, slices.shape)
        places = tuple(np.broadcast_to(place, slices.shape)[counted] for place in places)
        wide = operand.astype(np.float32) if operand.dtype.itemsize == 2 else operand.copy()
        changes = slices[counted].astype(wide.dtype)
        if add:
            np.add.at(wide, places, changes)
        else:
            wide[places] = changes
        return wide.astype(operand.dtype)

    return scatter


LOOKUPS = {"gather": _gather, "scatter": _scattered(False), "scatter-add": _scattered(True)}
