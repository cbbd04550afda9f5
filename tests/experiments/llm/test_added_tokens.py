"""The study with tokens that are added: they are learned, written, exported and refused."""

import json

import numpy as np
import pytest

import lora_jax
from experiments.llm.adapter_folder import AdapterFolder
from experiments.llm_lora import main
from experiments.models.pretrained import LanguageModel
from tests.agreement import assert_agree
from tests.experiments.conftest import promotion_of_users
from tests.experiments.small_llm_study import (
    model_in,
    write_encoder_decoder,
    write_lines,
    write_model,
)

pytestmark = pytest.mark.slow

for module in ("safetensors", "tokenizers", "jinja2"):
    pytest.importorskip(module)

KINDS = {"llama": write_model, "t5": write_encoder_decoder}
ADDED = ("<red>", "<blue>")
ANSWERS = {"hello": "<red>", "world": "<blue>"}


@pytest.fixture(scope="module", params=sorted(KINDS))
def study(request, tmp_path_factory):
    """Returns the arguments of a training whose answers are new tokens."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "model").mkdir()
    KINDS[request.param](folder / "model")
    (folder / "tokens.txt").write_text("<red>\thello\n<blue>\n", encoding="utf-8")
    words = np.random.default_rng(0).choice(list(ANSWERS), 60)
    entries = [
        {
            "messages": [
                {"role": "user", "content": f"{word}?"},
                {"role": "assistant", "content": ANSWERS[word]},
            ]
        }
        for word in words
    ]
    data = write_lines(folder / "examples.jsonl", entries)
    return [
        *("--model", str(folder / "model"), "--data", str(data), "--max-length", "32"),
        *("--validation-examples", "8", "--rank", "4", "--batch-size", "4", "--epochs", "10"),
        *("--learning-rate", "0.02", "--add-tokens", str(folder / "tokens.txt"), "--no-plots"),
    ]


@pytest.fixture(scope="module", params=["lora", "none"])
def run(request, study, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    with promotion_of_users():
        assert main([*study, "--method", request.param, "--out", str(out)]) == 0
    return request.param, out


def test_new_tokens_are_learned(run, study):
    method, out = run
    metrics = json.loads((out / "metrics.json").read_text())
    held_out = metrics["held_out"]
    assert held_out["on"]["loss"] < (0.2 if method == "lora" else 0.9) * held_out["off"]["loss"]
    assert held_out["merged"]["loss"] == pytest.approx(held_out["on"]["loss"], abs=1e-4)
    if method == "none":
        model = model_in(study)
        tables = 1 if model.config.tie_word_embeddings else 2
        width = model.shapes()["embed"]["embedding"].shape[1]
        assert metrics["parameters"]["trainable"] == tables * len(ADDED) * width


def test_they_are_written(run, capsys):
    method, out = run
    prompts = [word for each in ANSWERS for word in ("--prompt", f"{each}?")]
    adapter = ["--adapter", str(out / "adapter"), "--new-tokens", "4"]
    assert main(["generate", *adapter, *prompts]) == 0
    written = capsys.readouterr().out.splitlines()
    if method == "lora":
        assert written == list(ANSWERS.values())


def test_the_merged_model_has_them(run, tmp_path):
    _, out = run
    adapter = ["export", "--adapter", str(out / "adapter")]
    merged = tmp_path / "merged"
    assert main([*adapter, "--to", "huggingface", "--out", str(merged)]) == 0
    read = LanguageModel.read(merged)
    folder = AdapterFolder(out / "adapter")
    larger = folder.read_card().language_model(None)
    assert read.config.vocab_size == larger.config.vocab_size
    assert_agree(read.params(), lora_jax.merge(folder.restore(larger.params())))
    tokenizer = read.tokenizer()
    assert [tokenizer.id_of(each) for each in ADDED] == larger.added_ids


def test_peft_gets_their_rows(run, tmp_path, error_of):
    method, out = run
    assert (out / "peft").exists() == (method == "lora")
    if method == "none":
        export = ["export", "--adapter", str(out / "adapter"), "--to", "peft"]
        error = error_of(main, [*export, "--out", str(tmp_path / "peft")])
        assert "has no low-rank adapters, which PEFT needs" in error
        return
    config = json.loads((out / "peft" / "adapter_config.json").read_text())
    ids = AdapterFolder(out / "adapter").read_card().language_model(None).added_ids
    rows = config["trainable_token_indices"]
    found = rows if isinstance(rows, list) else next(iter(rows.values()))
    assert found == ids


def test_what_added_tokens_refuse(run, study, error_of, tmp_path):
    _, out = run
    export = ["export", "--adapter", str(out / "adapter"), "--to", "gguf"]
    error = error_of(main, [*export, "--out", str(tmp_path / "a.gguf")])
    assert "has tokens that the model's GGUF file has not" in error
    (tmp_path / "tokens.txt").write_text("hello\n")
    wrong = [*study, "--add-tokens", str(tmp_path / "tokens.txt"), "--out", str(tmp_path / "out")]
    assert "'hello' is a token of" in error_of(main, wrong)
