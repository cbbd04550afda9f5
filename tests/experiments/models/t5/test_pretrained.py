"""Folders of encoder-decoders: what is read from them, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.models.pretrained import LanguageModel
from experiments.models.t5 import T5
from tests import tiny_pieces, tiny_t5
from tests.agreement import assert_identical

safetensors = pytest.importorskip("safetensors.numpy")

VERSIONS = sorted(tiny_t5.CHANGES)


@pytest.fixture
def folder(tmp_path):
    tiny_t5.write_folder(tmp_path / "model", "1.0")
    return tmp_path / "model"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_gives_back_what_was_written(tmp_path, version):
    tiny_t5.write_folder(tmp_path / "one", version)
    tiny_t5.write_folder(tmp_path / "several", version, shard_bytes=50_000)
    assert not (tmp_path / "several" / "model.safetensors").exists()
    for name in ("one", "several"):
        model = LanguageModel.read(tmp_path / name)
        assert model.config == tiny_t5.config(version)
        assert model.network(remat=True) == T5(model.config, remat=True)
        assert model.huggingface_entries() == tiny_t5.entries(version)
        assert_identical(model.params(), tiny_t5.params(version))


def test_weights_in_another_dtype(folder):
    model = LanguageModel.read(folder)
    params = model.params(model.shapes(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, {"dense_act_fn": "relu", "is_gated_act": False}),
        ({"feed_forward_proj": "gated-gelu"}, {"dense_act_fn": "gelu_new", "is_gated_act": True}),
        ({"feed_forward_proj": "gelu"}, {"dense_act_fn": "gelu", "is_gated_act": False}),
        (
            {"feed_forward_proj": "gated-gelu", "dense_act_fn": "relu"},
            {"dense_act_fn": "relu", "is_gated_act": True},
        ),
        ({}, {"tie_word_embeddings": True, "scale_decoder_outputs": True}),
        (
            {"tie_word_embeddings": False},
            {"tie_word_embeddings": False, "scale_decoder_outputs": False},
        ),
        ({"num_decoder_layers": None}, {"num_decoder_layers": tiny_t5.LAYERS}),
        ({"num_decoder_layers": 7}, {"num_decoder_layers": 7}),
        ({"decoder_start_token_id": 5}, {"decoder_start_token_id": 5}),
    ],
)
def test_settings_that_entries_leave_open(entries, expected):
    found = tiny_t5.config("1.0", **{"feed_forward_proj": "relu", **entries})
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(("is_tied", "is_scaled"), [(True, True), (False, False), (True, False)])
def test_transformers_5_says_of_every_output_layer_that_it_is_the_embedding(
    tmp_path, is_tied, is_scaled
):
    version = "1.0" if is_tied else "1.1"
    tiny_t5.write_folder(tmp_path, version)
    config = {"tie_word_embeddings": True, "scale_decoder_outputs": is_scaled}
    (tmp_path / "config.json").write_text(json.dumps({**tiny_t5.entries(version), **config}))
    model = LanguageModel.read(tmp_path)
    assert model.config.tie_word_embeddings == is_tied
    assert model.config.scale_decoder_outputs == is_scaled
    assert_identical(model.params(), tiny_t5.params(version))


# --- tensors -------------------------------------------------------------------------------------

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


def changed(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    change(tensors)
    safetensors.save_file(tensors, file)


def test_copies_of_the_embedding_and_what_no_model_uses(folder):
    def add(tensors):
        tensors |= dict.fromkeys(COPIES, tensors["shared.weight"])
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        tensors[unused] = np.zeros((12, tiny_t5.HEADS), np.float32)

    changed(folder, add)
    assert_identical(LanguageModel.read(folder).params(), tiny_t5.params("1.0"))


@pytest.mark.parametrize("name", COPIES)
def test_copies_that_differ(folder, name):
    def add(tensors):
        tensors[name] = tensors["shared.weight"] + 1

    changed(folder, add)
    with pytest.raises(InputError, match=f"{name} is not shared.weight, of which it should be"):
        LanguageModel.read(folder).params()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("shared.weight"), "shared.weight"),
        (
            lambda tensors: tensors.pop("decoder.block.1.layer.1.EncDecAttention.k.weight"),
            "decoder.block.1.layer.1.EncDecAttention.k.weight",
        ),
        (lambda tensors: tensors.update(more=np.zeros(3, np.float32)), "more"),
        (
            lambda tensors: tensors.update({"encoder.final_layer_norm.weight": np.zeros(3)}),
            r"'encoder.final_layer_norm.weight' has the shape \(3,\); expected \(48,\)",
        ),
    ],
)
def test_tensors_that_are_missing_left_over_or_of_another_shape(folder, change, message):
    changed(folder, change)
    with pytest.raises(InputError, match=message):
        LanguageModel.read(folder).params()


# --- settings that are refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "umt5"}, "'umt5', whose layers each have .* positions; expected one of ll"),
        ({"model_type": "bart"}, "model_type is 'bart'; expected one of .*, t5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised by 'gptq'"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is False; this model computes with"),
        ({"feed_forward_proj": "gated"}, "feed_forward_proj is 'gated', expected one of gelu, "),
        ({"feed_forward_proj": 3}, "feed_forward_proj is 3, expected one of"),
        ({"dense_act_fn": "mish"}, "dense_act_fn is 'mish', expected one of"),
        ({"d_kv": ...}, "d_kv is missing"),
        ({"d_model": "wide"}, "d_model is 'wide', expected a whole number"),
        ({"num_layers": 0}, "num_layers is 0, expected more than 0"),
        ({"relative_attention_num_buckets": 3}, "num_buckets is 3, expected 4 or more"),
        ({"relative_attention_max_distance": 6}, "max_distance is 6, expected more than 6, half"),
        ({"decoder_start_token_id": 300}, "decoder_start_token_id is 300, expected less than"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
    ],
)
def test_settings_that_the_model_does_not_compute(tmp_path, changes, message):
    entries = {**tiny_t5.entries("1.0"), **changes}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: each for name, each in entries.items() if each is not ...}))
    with pytest.raises(InputError, match=message):
        LanguageModel.read(tmp_path)


def test_the_tokenizer_belongs_to_the_model(folder):
    pytest.importorskip("tokenizers")
    pieces = [(text, score, tiny_pieces.kind(text)) for text, score in tiny_pieces.trained()]
    tiny_pieces.write_pieces(folder / "spiece.model", pieces)
    sentinels = tiny_t5.VOCABULARY - len(pieces)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({"extra_ids": sentinels + 1}))
    with pytest.raises(InputError, match="expected the tokenizer that belongs to the model"):
        LanguageModel.read(folder).tokenizer()
    settings.write_text(json.dumps({"extra_ids": sentinels}))
    assert LanguageModel.read(folder).tokenizer().largest_id == tiny_t5.VOCABULARY - 1
