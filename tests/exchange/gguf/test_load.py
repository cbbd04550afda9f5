"""Reading GGUF, against what the package gguf dequantises: bit for bit."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import CheckpointError
from lora_jax.exchange import gguf as exchange
from lora_jax.quantization import QuantizedWeight

gguf = pytest.importorskip("gguf")

from tests.exchange.gguf.files import QUANTISED, TYPES, random_blocks, write  # noqa: E402


def assert_same_bits(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    bits = f"u{expected.dtype.itemsize}"
    np.testing.assert_array_equal(found.view(bits), expected.view(bits))


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("shape", [(512,), (6, 512), (5, 256), (3, 6, 512)], ids=str)
def test_random_blocks(kind, shape, tmp_path):
    data = random_blocks(kind, shape)
    weight = exchange.load(write(tmp_path / "file.gguf", {"w": (kind, data)}))["w"]
    expected = gguf.dequantize(data, TYPES[kind])
    assert (weight.shape, weight.dtype) == (shape, jnp.float32)
    assert_same_bits(weight.dequantize(), expected)
    # Nothing grows.
    assert weight.nbytes == data.nbytes
    if len(shape) == 2:
        kernel = weight.transpose((1, 0))
        assert kernel.codes is weight.codes
        assert_same_bits(kernel.dequantize(), expected.T)
    assert weight.batch_ndim == max(len(shape) - 2, 0)


@pytest.mark.parametrize("kind", QUANTISED)
def test_one_expert_of_a_stack(kind, tmp_path):
    data = random_blocks(kind, (3, 6, 256))
    weight = exchange.load(write(tmp_path / "file.gguf", {"w": (kind, data)}))["w"]
    expert = jax.tree.map(lambda leaf: leaf[1], weight)
    assert_same_bits(expert.dequantize(), gguf.dequantize(data[1], TYPES[kind]))


@pytest.mark.parametrize("kind", QUANTISED)
def test_rows_move_with_their_scales(kind, tmp_path):
    """llama.cpp interleaves the halves of each head: here they are put back, as codes."""
    data = random_blocks(kind, (16, 512))
    weight = exchange.load(write(tmp_path / "file.gguf", {"w": (kind, data)}))["w"]

    def in_halves(rows):
        return rows.reshape((2, 4, 2, 512)).transpose((0, 2, 1, 3)).reshape((16, 512))

    found = in_halves(weight)
    assert found.nbytes == weight.nbytes
    assert_same_bits(found.dequantize(), in_halves(gguf.dequantize(data, TYPES[kind])))


@pytest.mark.parametrize("kind", QUANTISED)
def test_under_jit(kind, tmp_path):
    """XLA may round a scale times a code plus an offset once; no more than that."""
    data = random_blocks(kind, (6, 512))
    weight = exchange.load(write(tmp_path / "file.gguf", {"w": (kind, data)}))["w"]
    found = jax.jit(QuantizedWeight.dequantize)(weight)
    expected = gguf.dequantize(data, TYPES[kind])
    # The terms of a sum are larger than it, where they cancel.
    step = 16 * np.abs(expected).max() * np.finfo(np.float32).eps
    tolerance = step if weight.offsets is not None else 0
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance)


def test_arrays(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 6)).astype(np.float32)
    short = np.asarray(jnp.asarray(values, jnp.bfloat16))
    tensors = {
        "single": values,
        "half": values.astype(np.float16),
        "short": ("BF16", short.view(np.uint8)),
        "vector": values[0],
    }
    found = exchange.load(write(tmp_path / "file.gguf", tensors))
    assert list(found) == list(tensors)
    assert_same_bits(found["single"], values)
    assert_same_bits(found["half"], values.astype(np.float16))
    assert_same_bits(found["short"], short)
    assert_same_bits(found["vector"], values[0])


def test_what_is_returned_does_not_change_with_the_file(tmp_path):
    path = write(tmp_path / "file.gguf", {"w": ("Q8_0", random_blocks("Q8_0", (2, 32)))})
    weight = exchange.load(path)["w"]
    before = np.array(weight.dequantize())
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(weight.dequantize(), before)


def test_some_tensors(tmp_path):
    values = np.ones((2, 3), np.float32)
    path = write(tmp_path / "file.gguf", {"a": values, "b": values, "c": values})
    assert list(exchange.load(path, names=["c", "a"])) == ["a", "c"]
    with pytest.raises(ValueError, match=r"`names` has 'd', which .*file\.gguf does not hold"):
        exchange.load(path, names=["a", "d"])


@pytest.mark.wrong_types
def test_one_name_is_not_several(tmp_path):
    path = write(tmp_path / "file.gguf", {"a": np.ones((2, 3), np.float32)})
    with pytest.raises(TypeError, match=r"`names` is 'a'; expected several, such as \['a'\]"):
        exchange.load(path, names="a")


def test_types_that_are_not_read(tmp_path):
    count, size = gguf.GGML_QUANT_SIZES[TYPES.Q5_K]
    tensors = {
        "odd": ("Q5_K", np.zeros((2, size), np.uint8)),
        "whole": np.zeros((2, 3), np.int32),
        "plain": np.zeros((2, 3), np.float32),
    }
    path = write(tmp_path / "file.gguf", tensors)
    with pytest.raises(CheckpointError, match=r"'odd: Q5_K', 'whole: I32'; expected F32.*names="):
        exchange.load(path)
    assert list(exchange.load(path, names=["plain"])) == ["plain"]
    assert count == 256


def test_files_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        exchange.load(tmp_path / "nothing.gguf")
    with pytest.raises(CheckpointError, match="is not a file"):
        exchange.load(tmp_path)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and so on, which is text")
    with pytest.raises(CheckpointError, match=r"broken\.gguf is damaged"):
        exchange.load(broken)


def test_a_file_that_was_cut_off(tmp_path):
    path = write(tmp_path / "file.gguf", {"w": ("Q8_0", random_blocks("Q8_0", (8, 512)))})
    path.write_bytes(path.read_bytes()[:-2048])
    with pytest.raises(CheckpointError, match=r"file\.gguf is damaged"):
        exchange.load(path)


def test_a_file_of_the_other_byte_order(tmp_path):
    path = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("w", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="gguf-convert-endian"):
        exchange.load(path)


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'lora-jax\[gguf\]'"):
        exchange.load(tmp_path / "file.gguf")
