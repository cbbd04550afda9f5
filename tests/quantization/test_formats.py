"""Codes, scales and what they stand for, against the definitions in NumPy and float64."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax
from lora_jax.quantization._formats import FORMATS
from lora_jax.quantization._packing import packed, unpacked
from tests.agreement import assert_agree
from tests.dequantized import LEVELS, dequantized

# The layouts of weights, with inputs that are multiples of a block and that are not.
WEIGHTS = {
    "kernel": ((128, 6), ("in", "out")),
    "PyTorch's kernel": ((6, 100), ("out", "in")),
    "stack": ((3, 70, 4), ("batch", "in", "out")),
    "convolution": ((3, 3, 8, 5), ("in", "in", "in", "out")),
    "heads": ((64, 2, 4), ("in", "out", "out")),
    "experts on the last axis": ((30, 4, 2), ("in", "out", "batch")),
}
ENCODINGS = [
    ("nf4", 64, True),
    ("nf4", 32, False),
    ("int8", 64, False),
    ("int8", None, False),
    ("int4", 32, True),
    ("int4", None, False),
    ("fp8_e4m3", None, False),
    ("fp8_e4m3", 16, False),
]


def quantized(shape: Any, axes: Any, name: str, block: Any, double: bool, dtype: Any) -> Any:
    weight = np.random.default_rng(3).standard_normal(shape).astype(dtype)
    params = lora_jax.quantize(
        {"w": jnp.asarray(weight)},
        "w",
        format=name,
        block=block,
        double_quantize=double,
        axes={"w": axes},
    )
    return weight, params["w"]


def rows_of(weight: np.ndarray, axes: Any) -> np.ndarray:
    """Returns a weight as (features, inputs) for each leading batch index, in float64."""
    batch = [axis for axis, role in enumerate(axes) if role == "batch" and axis == 0]
    inputs = [axis for axis, role in enumerate(axes) if role == "in"]
    others = [axis for axis in range(len(axes)) if axis not in (*batch, *inputs)]
    front = [weight.shape[axis] for axis in batch]
    moved = weight.astype(np.float64).transpose(*batch, *others, *inputs)
    count = int(np.prod([weight.shape[axis] for axis in inputs]))
    return moved.reshape(*front, -1, count)


def absmax_of_each(rows: np.ndarray, block: int | None) -> np.ndarray:
    """Returns the largest absolute value of each block, for each of its weights."""
    count = rows.shape[-1]
    starts = np.arange(0, count, block or count)
    largest = np.maximum.reduceat(np.abs(rows), starts, axis=-1)
    return np.repeat(largest, block or count, axis=-1)[..., :count]


def nearest(name: str, scaled: np.ndarray) -> np.ndarray:
    """Returns the number of the format that is nearest to each scaled weight, all in [-1, 1]."""
    if name == "fp8_e4m3":
        return (448 * scaled).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) / 448
    largest = {"int8": 127, "int4": 7}.get(name)
    if largest is not None:
        return np.round(scaled * largest) / largest
    levels = LEVELS[name]
    return levels[np.argmin(np.abs(scaled[..., None] - levels), axis=-1)]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_each_weight_becomes_the_nearest_number(kind: str, encoding: Any) -> None:
    name, block, double = encoding
    shape, axes = WEIGHTS[kind]
    weight, codes = quantized(shape, axes, name, block, False, np.float32)
    assert codes.shape == shape
    rows = rows_of(weight, axes)
    absmax = absmax_of_each(rows, block)
    expected = nearest(name, rows / absmax) * absmax
    assert_agree(rows_of(np.asarray(codes.dequantize()), axes), expected, tolerance=1e-6)
    if double:
        # The scales are rounded to 1 of 256 levels, with the largest deviation at 1.
        _, doubled = quantized(shape, axes, name, block, True, np.float32)
        numbers = nearest(name, rows / absmax)
        off = np.abs(rows_of(np.asarray(doubled.dequantize()), axes) - numbers * absmax)
        spread = np.max(np.abs(absmax - np.mean(absmax, axis=(-2, -1), keepdims=True)))
        assert np.all(off <= np.abs(numbers) * 0.01 * spread + 1e-5)
        assert np.array_equal(doubled.codes, codes.codes)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("kind", ["kernel", "stack", "heads"])
def test_codes_dequantise_as_defined(kind: str, dtype: Any, encoding: Any) -> None:
    _, codes = quantized(*WEIGHTS[kind], *encoding, dtype)
    assert codes.dtype == dtype
    expected = dequantized(jax.device_get(codes))
    actual = np.asarray(codes.dequantize())
    assert actual.dtype == dtype
    assert_agree(actual.astype(np.float64), expected, tolerance=float(jnp.finfo(dtype).eps))


def test_the_levels_are_those_of_the_definition() -> None:
    for name, levels in LEVELS.items():
        # The published maps were computed in float32, and differ by its rounding.
        np.testing.assert_allclose(FORMATS[name].levels, levels, rtol=2e-7, err_msg=name)
    assert len(LEVELS["dynamic8"]) == len(set(LEVELS["dynamic8"])) == 256


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_a_leading_batch_index_is_cut_leaf_by_leaf(kind: str, encoding: Any) -> None:
    _, codes = quantized(*WEIGHTS[kind], *encoding, np.float32)
    if not codes.batch_ndim:
        return
    for index, whole in enumerate(np.asarray(codes.dequantize())):
        part = jax.tree.map(lambda leaf, index=index: leaf[index], codes)
        assert part.shape == whole.shape
        np.testing.assert_array_equal(np.asarray(part.dequantize()), whole)


@pytest.mark.parametrize("kind", ["kernel", "stack", "convolution"])
def test_a_transpose_touches_no_array(kind: str) -> None:
    shape, axes = WEIGHTS[kind]
    _, codes = quantized(shape, axes, "nf4", 32, True, np.float32)
    batch = codes.batch_ndim
    for order in itertools.permutations(range(batch, len(shape))):
        moved = codes.transpose((*range(batch), *order))
        assert moved.codes is codes.codes
        expected = np.asarray(codes.dequantize()).transpose((*range(batch), *order))
        assert moved.shape == expected.shape
        np.testing.assert_array_equal(np.asarray(moved.dequantize()), expected)


def test_a_batch_axis_stays_in_front() -> None:
    _, codes = quantized(*WEIGHTS["stack"], "nf4", 32, True, np.float32)
    with pytest.raises(ValueError, match=r"`axes` is \(1, 0, 2\)"):
        codes.transpose((1, 0, 2))


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("size", [1, 2, 7, 16])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_packing_loses_nothing(bits: int, size: int, axis: int) -> None:
    shape = [3, 3, 3]
    shape[axis] = size
    codes = np.random.default_rng(0).integers(0, 2**bits, shape).astype(np.uint8)
    found = packed(jnp.asarray(codes), bits, axis)
    assert found.dtype == jnp.uint8
    whole_bytes = {4: -(-size // 2), 6: 3 * -(-size // 4)}
    assert found.shape[axis] == whole_bytes[bits]
    np.testing.assert_array_equal(np.asarray(unpacked(found, bits, axis, size)), codes)


def test_neighbours_share_a_byte_the_first_in_its_high_bits() -> None:
    assert packed(jnp.array([[1], [2], [3]], jnp.uint8), 4, 0).tolist() == [[0x12], [0x30]]
    six = packed(jnp.array([1, 2, 3, 4], jnp.uint8), 6, 0)
    assert six.tolist() == [0b00000100, 0b00100000, 0b11000100]


def test_a_codebook_replaces_the_levels() -> None:
    _, codes = quantized(*WEIGHTS["stack"], "nf4", 32, False, np.float32)
    books = jnp.asarray(np.random.default_rng(1).standard_normal((3, 16)), jnp.float32)
    with_books = dataclasses.replace(codes, codebook=books)
    for index in range(3):
        part = jax.tree.map(lambda leaf, index=index: leaf[index], with_books)
        np.testing.assert_array_equal(
            np.asarray(part.dequantize()), np.asarray(with_books.dequantize())[index]
        )
        expected = dequantized(jax.device_get(part))
        assert_agree(np.asarray(part.dequantize(), np.float64), expected, tolerance=1e-6)


@pytest.mark.parametrize("name", ["nf4", "int8", "int4", "fp8_e4m3"])
@pytest.mark.parametrize("size", [0, 1e-38, 1e-36, 1e-34, 1e-30])
def test_blocks_and_features_of_zeros_and_of_the_smallest_numbers(size: float, name: str) -> None:
    """A feature that is dead is zero, whatever shares its scale."""
    weight = np.ones((128, 3), np.float32)
    weight[:64] = 0
    weight[:, 1] = size
    codes = lora_jax.quantize({"w": jnp.asarray(weight)}, "w", format=name, double_quantize=False)
    found = np.asarray(codes["w"].dequantize())
    assert np.all(np.isfinite(codes["w"].scales))
    np.testing.assert_allclose(found, weight, rtol=0.01, atol=1e-37)
    if size == 0:
        np.testing.assert_array_equal(np.asarray(codes["w"].codes)[:, 1], codes["w"].codes[0, 0])


@pytest.mark.parametrize(
    ("name", "block", "bits"),
    [
        ("nf4", 64, 4 + 8 / 64 + 32 / (64 * 256)),
        ("int8", 64, 8 + 32 / 64),
        ("int8", None, 8 + 32 / 4096),
        ("int4", 64, 4 + 32 / 64),
        ("fp8_e4m3", 64, 8 + 32 / 4096),
    ],
)
def test_bytes_are_those_of_the_format(name: str, block: Any, bits: float) -> None:
    weight = jnp.ones((4096, 256), jnp.bfloat16)
    codes = lora_jax.quantize({"w": weight}, "w", format=name, block=block)["w"]
    assert 8 * codes.nbytes / codes.size == pytest.approx(bits, rel=1e-4)
