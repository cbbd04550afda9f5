"""Random keys, each a number, and bits drawn from them."""

from typing import Any

import numpy as np


def _mixed(*numbers: Any) -> np.ndarray:
    """Returns an integer of 64 bits for each combination of integers (SplitMix64's mixer)."""
    total = np.zeros(np.broadcast_shapes(*(np.shape(n) for n in numbers)), np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            total = (
                total * np.uint64(31)
                + np.asarray(number).astype(np.uint64)
                + np.uint64(0x9E3779B97F4A7C15)
            )
            total = (total ^ (total >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            total = (total ^ (total >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            total = total ^ (total >> np.uint64(31))
    return total


def _counted(keys: np.ndarray, shape: Any) -> np.ndarray:
    """Returns an integer for each key and each place of a shape."""
    places = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    return _mixed(np.asarray(keys).reshape(*np.shape(keys), *(1,) * len(shape)), places + 1)


def _bits(keys: np.ndarray, *, bit_width: int, shape: Any, **_: Any) -> np.ndarray:
    return (_counted(keys, shape) >> np.uint64(64 - bit_width)).astype(f"u{bit_width // 8}")


def _unwrapped(keys: np.ndarray, **_: Any) -> np.ndarray:
    keys = np.asarray(keys)
    return np.stack([keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)], -1).astype(np.uint32)


def _wrapped(words: np.ndarray, **_: Any) -> np.ndarray:
    wide = np.asarray(words).astype(np.uint64)
    return (wide[..., 0] << np.uint64(32)) | wide[..., 1]


RANDOM = {
    "random_bits": _bits,
    "random_fold_in": lambda keys, numbers, **_: _mixed(keys, numbers),
    "random_seed": lambda seeds, **_: _mixed(seeds),
    "random_split": lambda keys, *, shape, **_: _counted(keys, shape),
    "random_unwrap": _unwrapped,
    "random_wrap": _wrapped,
}
