"""Checkpoints that bitsandbytes makes, and weights that it quantises, on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.exchange import bitsandbytes as exchange
from lora_jax.quantization import QuantizedWeight
from lora_jax.quantization._formats import FORMATS

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from tests.exchange.bitsandbytes.files import (  # noqa: E402
    functional,
    quantised,
    random_weight,
    write,
)

DTYPES = ("float32", "bfloat16", "float16")


def as_array(tensor):
    return jnp.asarray(tensor.float().numpy()).astype(str(tensor.dtype).removeprefix("torch."))


def loaded(tmp_path, weight, **options):
    """Returns a weight that is read from a file, and what bitsandbytes dequantises it to."""
    parts, expected = quantised(weight, **options)
    found = exchange.load(write(tmp_path / "model.safetensors", {"a.weight": parts}))
    assert list(found) == ["a.weight"]
    # bitsandbytes makes a matrix of one row of a vector.
    return found["a.weight"], as_array(expected).reshape(weight.shape), parts


def assert_equal(weight, expected):
    found = weight.dequantize()
    assert (weight.shape, weight.dtype) == (expected.shape, expected.dtype)
    # Equal as numbers: for an fp4 of -0 bitsandbytes has -0 on some paths and 0 on others.
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(8, 192), (48, 100), (7, 9), (130,), (3, 4, 64)], ids=str)
def test_a_weight_of_a_file(shape, kind, dtype, nested, tmp_path):
    weight, expected, parts = loaded(
        tmp_path, random_weight(shape, dtype), quant_type=kind, compress_statistics=nested
    )
    assert_equal(weight, expected)
    has_own_levels = kind == "nf4"
    assert (weight.codebook is None) == has_own_levels
    assert isinstance(weight.scales, QuantizedWeight) == nested
    # Nothing grows: the levels are the format's, and the rest is what the file has.
    names = ["", ".absmax", *([".nested_absmax"] if nested else [])]
    stored = sum(parts[name].numel() * parts[name].element_size() for name in names)
    own = 4 * nested + 64 * (not has_own_levels)
    levels = [weight.scales.codebook] if nested else []
    own += sum(1024 for each in levels if each is not None)
    assert weight.nbytes == stored + own


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(8, 192), (48, 100)], ids=str)
def test_its_transpose_is_a_kernel(shape, nested, tmp_path):
    weight, expected, _ = loaded(
        tmp_path, random_weight(shape), quant_type="nf4", compress_statistics=nested
    )
    kernel = weight.transpose((1, 0))
    assert kernel.codes is weight.codes
    assert_equal(kernel, expected.T)
    if shape[1] == 192:
        assert_equal(kernel.reshape((192, 2, 4)), expected.T.reshape(192, 2, 4))


@pytest.mark.parametrize("block", [128, 4096])
def test_other_blocks(block, tmp_path):
    weight, expected, _ = loaded(
        tmp_path,
        random_weight((16, 512)),
        quant_type="nf4",
        compress_statistics=True,
        blocksize=block,
    )
    assert weight.block == block
    assert_equal(weight, expected)


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_codes_in_the_bytes_of_another_dtype(storage, tmp_path):
    weight, expected, _ = loaded(
        tmp_path, random_weight((8, 64)), quant_type="nf4", quant_storage=getattr(torch, storage)
    )
    assert_equal(weight, expected)


def test_other_levels_are_kept(tmp_path):
    parts, _ = quantised(random_weight((4, 64)), quant_type="nf4")
    levels = torch.linspace(-1, 1, 16)
    path = write(tmp_path / "model.safetensors", {"w": {**parts, ".quant_map": levels}})
    weight = exchange.load(path)["w"]
    np.testing.assert_array_equal(weight.codebook, levels.numpy())
    codes = parts[""].numpy().reshape(4, 32)
    places = np.stack([codes >> 4, codes & 15], axis=-1).reshape(4, 64)
    expected = levels.numpy()[places] * parts[".absmax"].numpy()[:, None]
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_the_levels_of_scales_are_those_of_bitsandbytes():
    own = np.asarray(FORMATS["dynamic8"].levels, np.float32)
    theirs = functional.create_dynamic_map().numpy()
    # How PyTorch rounds them depends on the processor.
    np.testing.assert_array_max_ulp(own, theirs, maxulp=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (256, 512)], ids=str)
def test_quantize_gives_the_same_codes(shape, dtype):
    weight = random_weight(shape, dtype)
    weight[3] = 0
    parts, expected = quantised(weight, quant_type="nf4", compress_statistics=False)
    own = lora_jax.quantize(
        {"w": as_array(weight).T}, "w", format="nf4", block=64, double_quantize=False
    )["w"]
    np.testing.assert_array_equal(own.codes, parts[""].numpy().reshape(shape[0], -1).T)
    np.testing.assert_array_equal(own.scales, parts[".absmax"].numpy().reshape(shape[0], -1).T)
    assert_equal(own, as_array(expected).T)


def test_quantize_gives_the_same_scales_of_scales():
    """Except in last bits, and where bitsandbytes does not take the nearest level.

    Its kernel for CPUs takes another one for some numbers about midway between two levels, and its
    mean is a sum in another order.
    """
    parts, _ = quantised(random_weight((512, 1024)), quant_type="nf4", compress_statistics=True)
    own = lora_jax.quantize(
        {"w": as_array(random_weight((512, 1024))).T}, "w", format="nf4", block=64
    )["w"]
    np.testing.assert_array_equal(own.codes, parts[""].numpy().reshape(512, -1).T)
    np.testing.assert_allclose(own.scales.scales, parts[".nested_absmax"].numpy(), rtol=1e-5)
    codes = np.asarray(own.scales.codes).astype(int), parts[".absmax"].numpy().reshape(-1)
    assert np.mean(codes[0] == codes[1]) > 0.99
    assert np.abs(codes[0] - codes[1]).max() <= 1


def test_it_computes_as_a_layer_of_bitsandbytes(tmp_path):
    """`adapt` with the weight of a file, as with the array that bitsandbytes makes of it."""
    weight, expected, _ = loaded(
        tmp_path, random_weight((32, 64)), quant_type="nf4", compress_statistics=True
    )

    def layer(params, x):
        return jnp.tanh(x @ params["kernel"])

    x = jax.random.normal(jax.random.key(0), (5, 64))
    found = lora_jax.adapt(layer)({"kernel": weight.transpose((1, 0))}, x)
    np.testing.assert_allclose(found, layer({"kernel": expected.T}, x), rtol=1e-5, atol=1e-6)
