"""Tensors of a folder, none of which is read before it is needed."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.checkpoint import CheckpointError
from lora_jax.exchange import huggingface, place
from lora_jax.exchange.peft import Rule
from tests.agreement import assert_identical

safetensors = pytest.importorskip("safetensors.numpy")

LAYERS, SIDE, KINDS = 4, 512, 4
RULES = [Rule("layers.{n}.{name}.weight", "layers/{name}")]
SHAPES = {
    "layers": {
        f"kind_{k}": jax.ShapeDtypeStruct((LAYERS, SIDE, SIDE), jnp.float32) for k in range(KINDS)
    }
}
LEAF = LAYERS * SIDE * SIDE * 4


def written(folder, dtype=np.float32):
    random = np.random.default_rng(0)
    for layer in range(LAYERS):
        tensors = {
            f"layers.{layer}.kind_{k}.weight": random.normal(size=(SIDE, SIDE)).astype(dtype)
            for k in range(KINDS)
        }
        safetensors.save_file(tensors, folder / f"part-{layer}.safetensors")
    files = {
        f"layers.{layer}.kind_{k}.weight": f"part-{layer}.safetensors"
        for layer in range(LAYERS)
        for k in range(KINDS)
    }
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=str)
def test_the_host_holds_the_tensors_of_one_leaf(tmp_path, dtype):
    """Also where each is quantised when it is on its device, and the model never whole."""
    written(tmp_path, dtype)

    def quantised(path, value):
        axes = {"leaf": ("batch", "in", "out")}
        leaf = lora_jax.quantize({"leaf": value}, "leaf", format="int8", axes=axes)["leaf"]
        jax.block_until_ready(leaf)
        value.delete()
        return leaf

    def read():
        with huggingface.tensors(tmp_path) as tensors:
            return place(tensors, SHAPES, names=RULES, convert=quantised)

    params = read()  # the first time compiles
    tracemalloc.start()
    try:
        read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The stack, and beside it a tensor as the reader makes it, as an array, and in its dtype.
    assert peak <= LEAF + 4 * LEAF / LAYERS
    name = "layers.2.kind_1.weight"
    with huggingface.tensors(tmp_path) as tensors:
        expected = np.asarray(tensors[name]).astype(np.float32).T
    found = params["layers"]["kind_1"].dequantize()[2]
    assert np.abs(found - expected).max() <= np.abs(expected).max() / 127


def test_shapes_and_dtypes_are_known_before(tmp_path):
    written(tmp_path, jnp.bfloat16)
    with huggingface.tensors(tmp_path) as tensors:
        assert len(tensors) == LAYERS * KINDS
        tensor = tensors["layers.0.kind_0.weight"]
        assert (tensor.shape, tensor.dtype) == ((SIDE, SIDE), jnp.dtype(jnp.bfloat16))
        with pytest.raises(CheckpointError, match=r"has the shape \(512, 512\); expected"):
            place(tensors, {"layers": {"kind_0": jnp.zeros((4, 2, 2))}}, names=RULES)


def test_what_is_not_there(tmp_path):
    with (
        pytest.raises(
            CheckpointError,
            match=r"holds none of 'model.safetensors', .*'diffusion_pytorch_model.safetensors'",
        ),
        huggingface.tensors(tmp_path),
    ):
        pass
    written(tmp_path)
    (tmp_path / "part-1.safetensors").unlink()
    with (
        pytest.raises(CheckpointError, match=r"part-1.safetensors is missing"),
        huggingface.tensors(tmp_path),
    ):
        pass


def test_a_tensor_is_read_each_time(tmp_path):
    safetensors.save_file({"w": np.arange(3, dtype=np.int64)}, tmp_path / "model.safetensors")
    with huggingface.tensors(tmp_path / "model.safetensors") as tensors:
        first, second = np.asarray(tensors["w"]), np.asarray(tensors["w"], np.float32)
    assert_identical((first, second), (np.arange(3), np.arange(3, dtype=np.float32)))
