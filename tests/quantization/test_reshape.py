"""Reshaping a quantised weight against reshaping the array that it dequantises to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.quantization import QuantizedWeight


def kernel(shape, axes, **options):
    array = jax.random.normal(jax.random.key(len(shape)), shape)
    return lora_jax.quantize({"w": array}, "w", axes={"w": axes}, block=4, **options)["w"]


SHAPES = [
    ((8, 12), ("in", "out"), (8, 3, 4)),
    ((8, 12), ("in", "out"), (2, 4, 12)),
    ((8, 12), ("in", "out"), (-1, 2, 3, 4)),
    ((8, 12), ("in", "out"), (1, 8, 12, 1)),
    ((2, 4, 3, 4), ("in", "in", "out", "out"), (8, 12)),
    ((2, 4, 3, 4), ("in", "in", "out", "out"), (4, 2, 6, 2)),
    ((6, 5, 4), ("out", "in", "out"), (2, 3, 5, 2, 2)),
    ((3, 8, 12), ("batch", "in", "out"), (3, 8, 3, 4)),
    ((3, 8, 12), ("batch", "in", "out"), (3, 2, 4, 12)),
    ((8, 1, 12), ("in", "out", "out"), (8, 12)),
    ((8, 1, 1, 12), ("in", "out", "in", "out"), (8, 12)),
]


@pytest.mark.parametrize("encoding", [{"format": "int8"}, {"format": "nf4"}], ids=str)
@pytest.mark.parametrize(("shape", "axes", "new"), SHAPES)
def test_the_array_is_the_reshaped_one(shape, axes, new, encoding):
    weight = kernel(shape, axes, **encoding)
    reshaped = weight.reshape(new)
    expected = np.asarray(weight.dequantize()).reshape(new)
    assert reshaped.shape == expected.shape
    np.testing.assert_array_equal(reshaped.dequantize(), expected)
    back = reshaped.reshape(shape)
    np.testing.assert_array_equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("encoding", [{"format": "int8"}, {"format": "nf4"}], ids=str)
def test_a_transposed_weight_is_reshaped(encoding):
    weight = kernel((8, 12), ("in", "out"), **encoding).transpose((1, 0))
    split = weight.reshape((3, 4, 2, 4)).transpose((2, 0, 3, 1))
    expected = np.asarray(weight.dequantize()).reshape(3, 4, 2, 4).transpose(2, 0, 3, 1)
    np.testing.assert_array_equal(split.dequantize(), expected)


def test_features_are_put_in_another_order():
    weight = kernel((8, 12), ("in", "out"), format="int8")
    rotated = weight.reshape((8, 3, 2, 2)).transpose((0, 1, 3, 2)).reshape((8, 12))
    expected = np.asarray(weight.dequantize()).reshape(8, 3, 2, 2).swapaxes(2, 3).reshape(8, 12)
    np.testing.assert_array_equal(rotated.dequantize(), expected)


def test_scales_that_are_quantised_keep_their_order():
    weight = kernel((8, 12), ("in", "out"), format="nf4")
    assert isinstance(weight.scales, QuantizedWeight)
    with pytest.raises(ValueError, match=r"joins the axes .*weight\.dequantize\(\)"):
        weight.reshape((8, 3, 4)).transpose((0, 2, 1)).reshape((8, 12))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ((96,), r"joins the axes \(0, 1\) of the sizes \(8, 12\)"),
        ((4, 24), "joins the axes"),
        ((8, 13), r"`shape` is \(8, 13\); expected one of 96 weights"),
        ((-1, -1), "expected one of 96 weights"),
        ((-2, -48), "expected one of 96 weights"),
    ],
)
def test_a_shape_that_it_cannot_have(new, message):
    with pytest.raises(ValueError, match=message):
        kernel((8, 12), ("in", "out"), format="int8").reshape(new)


def test_blocked_axes_in_another_order_do_not_join():
    weight = kernel((4, 6, 3), ("in", "in", "out"), format="int8")
    with pytest.raises(ValueError, match="joins the axes"):
        weight.transpose((1, 0, 2)).reshape((24, 3))


def test_batch_axes_stay():
    weight = kernel((3, 8, 12), ("batch", "in", "out"), format="int8")
    with pytest.raises(ValueError, match=r"expected the batch axes .* as \(3,\)"):
        weight.reshape((24, 12))


def test_offsets_of_each_block_are_reshaped():
    weight = kernel((8, 12), ("in", "out"), format="int8")
    offsets = jnp.arange(24.0).reshape(2, 12)
    weight = dataclasses.replace(weight, offsets=offsets)
    expected = np.asarray(weight.dequantize()).reshape(8, 3, 4)
    np.testing.assert_array_equal(weight.reshape((8, 3, 4)).dequantize(), expected)


def test_it_is_traced():
    weight = kernel((8, 12), ("in", "out"), format="nf4")
    reshaped = jax.jit(lambda each: each.reshape((8, 3, 4)))(weight)
    expected = np.asarray(weight.dequantize()).reshape(8, 3, 4)
    np.testing.assert_array_equal(reshaped.dequantize(), expected)
