"""Files and folders of 4-bit checkpoints, sound and damaged."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest

from lora_jax import CheckpointError
from lora_jax.exchange import bitsandbytes as exchange

safetensors = pytest.importorskip("safetensors.numpy")

LEVELS = np.linspace(-1, 1, 16, dtype=np.float32)


def tensors_of(name="w", **state):
    """Returns a weight (2, 64) whose codes are all the first level, scaled by 1 and 2."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]} | state
    return {
        name: np.zeros((64, 1), np.uint8),
        f"{name}.absmax": np.array([1, 2], np.float32),
        f"{name}.quant_map": LEVELS,
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(
            json.dumps(state).encode(), np.uint8
        ),
    }


def write(path, tensors):
    safetensors.save_file(tensors, path)
    return path


def assert_is_the_weight(weight):
    expected = np.repeat(np.array([[-1], [-2]], np.float32), 64, axis=1)
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_arrays_stay_as_they_are(tmp_path):
    others = {
        "norm": np.arange(3, dtype=ml_dtypes.bfloat16),
        "half": np.arange(3, dtype=np.float16),
        "single": np.arange(3, dtype=np.float32),
    }
    found = exchange.load(write(tmp_path / "model.safetensors", {**tensors_of(), **others}))
    assert set(found) == {"w", *others}
    assert_is_the_weight(found["w"])
    for name, expected in others.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)


def test_a_folder_of_one_file(tmp_path):
    write(tmp_path / "model.safetensors", tensors_of())
    assert_is_the_weight(exchange.load(tmp_path)["w"])


def test_a_folder_of_several_files(tmp_path):
    """The parts of one weight may be in two files."""
    tensors = {**tensors_of("a"), **tensors_of("b")}
    files = {"1.safetensors": list(tensors)[:5], "2.safetensors": list(tensors)[5:]}
    for file, names in files.items():
        write(tmp_path / file, {name: tensors[name] for name in names})
    weight_map = {name: file for file, names in files.items() for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = exchange.load(tmp_path)
    assert list(found) == ["a", "b"]
    assert_is_the_weight(found["a"])
    assert_is_the_weight(found["b"])
    assert list(exchange.load(tmp_path, names=["b"])) == ["b"]

    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2\.safetensors is missing"):
        exchange.load(tmp_path)


def test_an_index_that_names_what_is_not_there(tmp_path):
    write(tmp_path / "1.safetensors", tensors_of())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"other": "1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"1\.safetensors does not hold 'other'"):
        exchange.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"other": "../1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'\.\./1\.safetensors'; expected one beside it"):
        exchange.load(tmp_path)


def test_a_name_that_is_not_there(tmp_path):
    path = write(tmp_path / "model.safetensors", tensors_of("layer.weight"))
    with pytest.raises(ValueError, match=r"'layer\.weights'.*nearest.*'layer\.weight'"):
        exchange.load(path, names=["layer.weights"])


def test_what_is_not_a_checkpoint(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"does not exist: expected one of .model\.safetensors"
    ):
        exchange.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"holds none of .model\.safetensors"):
        exchange.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"text")
    with pytest.raises(CheckpointError, match="is damaged"):
        exchange.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w.absmax": None}, r"holds no 'w\.absmax' beside 'w'"),
        ({"w.quant_map": None}, r"holds no 'w\.quant_map'"),
        ({"w.absmax": np.ones(3, np.float32)}, r"'w\.absmax' of 3 numbers.*expected 2 in float32"),
        ({"w.absmax": np.ones(2, np.uint8)}, r"'w\.absmax' of 2 numbers in uint8"),
        ({"w": np.zeros((63, 1), np.uint8)}, r"'w' of 63 numbers.*expected 64.*\(2, 64\)"),
        ({"w.quant_state.bitsandbytes__nf4": None}, r"'w\.absmax', 'w\.quant_map' belong to"),
        ({"w.quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)}, "can't be read"),
    ],
)
def test_a_damaged_weight(change, message, tmp_path):
    tensors = {**tensors_of(), **change}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    path = write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message):
        exchange.load(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"dtype": "int8"}, "'int8'; expected one of 'float32', 'bfloat16', 'float16'"),
        ({"quant_type": "nf3"}, "'nf3'; expected one of 'nf4', 'fp4'"),
        ({"shape": None}, "can't be read"),
        ({"shape": []}, "can't be read"),
        ({"blocksize": 0}, "can't be read"),
        ({"nested_blocksize": 256}, "nested_offset"),
    ],
)
def test_a_damaged_state(state, message, tmp_path):
    path = write(tmp_path / "model.safetensors", tensors_of(**state))
    with pytest.raises(CheckpointError, match=message):
        exchange.load(path)


def test_weights_of_8_bits_are_not_read(tmp_path):
    tensors = {"w": np.zeros((2, 3), np.int8), "w.SCB": np.ones(2, np.float32)}
    path = write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"LLM\.int8's format, 'w'.*load_in_4bit=True"):
        exchange.load(path)


def test_whole_numbers_that_jax_would_cut_down(tmp_path):
    tensors = {**tensors_of(), "positions": np.arange(3)}
    path = write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"'positions' in int64.*names="):
        exchange.load(path)
    assert list(exchange.load(path, names=["w"])) == ["w"]


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    path = write(tmp_path / "model.safetensors", tensors_of())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"exchange\.bitsandbytes needs .*'lora-jax\[peft\]'"):
        exchange.load(path)
