"""Ops on each element."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

Op = Callable[..., Any]

_BY_BITS = {
    (5, 10): np.float16,
    (8, 7): ml_dtypes.bfloat16,
    (8, 23): np.float32,
    (11, 52): np.float64,
}


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind in "iu":
        return np.trunc(np.divide(a, b)).astype(a.dtype)
    return np.divide(a, b)


def _selected(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.choose(np.asarray(which).astype(np.int64), np.broadcast_arrays(*cases))


def _reduced_precision(x: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Rounds through the dtype that has so many bits."""
    narrow = _BY_BITS[exponent_bits, mantissa_bits]
    return np.asarray(x).astype(narrow).astype(x.dtype)


def _bits_as(x: np.ndarray, *, new_dtype: Any, **_: Any) -> np.ndarray:
    """A narrower dtype adds an axis, a wider one takes the last away."""
    x, size = np.ascontiguousarray(x), np.dtype(new_dtype).itemsize
    if size < x.dtype.itemsize:
        x = x[..., None]
    viewed = x.view(new_dtype)
    return viewed[..., 0] if size > x.dtype.itemsize else viewed


def _logical_shift(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    return (a.view(unsigned) >> b.astype(unsigned)).view(a.dtype)


def _plain(fn: Op) -> Op:
    """Returns a function that takes none of the op's parameters."""
    return lambda *inputs, **params: fn(*inputs)


def _identity(x: Any) -> Any:
    return x


ELEMENTWISE: dict[str, Op] = {
    name: _plain(fn)
    for name, fn in {
        "abs": np.abs,
        "add": np.add,
        "add_any": np.add,
        "and": np.bitwise_and,
        "ceil": np.ceil,
        "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
        "copy": np.copy,
        "copy_p": np.copy,
        "cos": np.cos,
        "div": _divided,
        "eq": np.equal,
        "exp": np.exp,
        "floor": np.floor,
        "ge": np.greater_equal,
        "gt": np.greater,
        "is_finite": np.isfinite,
        "le": np.less_equal,
        "log": np.log,
        "log1p": np.log1p,
        "logistic": lambda x: 1 / (1 + np.exp(-x)),
        "lt": np.less,
        "max": np.maximum,
        "min": np.minimum,
        "mul": np.multiply,
        "ne": np.not_equal,
        "neg": np.negative,
        "not": np.invert,
        "one_minus_square": lambda x: 1 - np.square(x),
        "or": np.bitwise_or,
        "pow": np.power,
        "rem": np.fmod,
        "round": np.round,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "select_n": _selected,
        "shift_left": np.left_shift,
        "shift_right_arithmetic": np.right_shift,
        "shift_right_logical": _logical_shift,
        "sign": np.sign,
        "sin": np.sin,
        "sqrt": np.sqrt,
        "square": np.square,
        "sub": np.subtract,
        "tanh": np.tanh,
        "xor": np.bitwise_xor,
        # What changes where an array is, or what is known of it, and not a number.
        "device_put": lambda *xs: list(xs),
        "mesh_cast": _identity,
        "name": _identity,
        "optimization_barrier": lambda *xs: list(xs),
        "pcast": _identity,
        "pvary": lambda *xs: list(xs),
        "reshard": _identity,
        "sharding_constraint": _identity,
        "stop_gradient": _identity,
    }.items()
} | {
    "convert_element_type": lambda x, *, new_dtype, **_: np.asarray(x).astype(new_dtype),
    "bitcast_convert_type": _bits_as,
    "integer_pow": lambda x, *, y, **_: (
        np.power(x, np.asarray(y, x.dtype)) if y >= 0 else 1 / x**-y
    ),
    "reduce_precision": lambda x, *, exponent_bits, mantissa_bits, **_: _reduced_precision(
        x, exponent_bits, mantissa_bits
    ),
}
