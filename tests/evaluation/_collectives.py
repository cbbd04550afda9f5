"""What devices exchange within a `shard_map`: each op takes and gives a list, one for each."""

from typing import Any

import numpy as np


def _summed(xs: list[np.ndarray], **_: Any) -> list[np.ndarray]:
    total = sum(xs[1:], start=xs[0])
    return [total] * len(xs)


def _gathered(xs: list[np.ndarray], *, all_gather_dimension: int, tiled: bool, **_: Any) -> Any:
    join = np.concatenate if tiled else np.stack
    return [join(xs, all_gather_dimension)] * len(xs)


def _scattered(xs: list[np.ndarray], *, scatter_dimension: int, tiled: bool, **_: Any) -> Any:
    parts = np.split(sum(xs[1:], start=xs[0]), len(xs), scatter_dimension)
    return parts if tiled else [part.squeeze(scatter_dimension) for part in parts]


def _exchanged(
    xs: list[np.ndarray], *, split_axis: int, concat_axis: int, tiled: bool = False, **_: Any
) -> list[np.ndarray]:
    parts = [np.split(x, len(xs), split_axis) for x in xs]
    if not tiled:
        parts = [[part.squeeze(split_axis) for part in each] for each in parts]
    join = np.concatenate if tiled else np.stack
    return [join([each[device] for each in parts], concat_axis) for device in range(len(xs))]


def _permuted(xs: list[np.ndarray], *, perm: Any, **_: Any) -> list[np.ndarray]:
    senders = {receiver: sender for sender, receiver in perm}
    return [
        xs[senders[device]] if device in senders else np.zeros_like(xs[device])
        for device in range(len(xs))
    ]


COLLECTIVES = {
    "all_gather": _gathered,
    "all_gather_invariant": _gathered,
    "all_to_all": _exchanged,
    "ppermute": _permuted,
    "psum": _summed,
    "psum2": _summed,
    "psum_invariant": _summed,
    "reduce_scatter": _scattered,
}


def axis_numbers(count: int) -> list[np.ndarray]:
    """Returns what `axis_index` gives on each device."""
    return [np.asarray(device, np.int32) for device in range(count)]


def shards(x: Any, spec: Any, count: int) -> list[Any]:
    """Returns each device's part of an array."""
    cut = [axis for axis, name in enumerate(spec) if name is not None and name != ()]
    return [x] * count if not cut else np.split(x, count, cut[0])


def joined(parts: list[Any], spec: Any) -> Any:
    """Returns the array that these are the devices' parts of."""
    cut = [axis for axis, name in enumerate(spec) if name is not None and name != ()]
    return parts[0] if not cut else np.concatenate(parts, cut[0])
