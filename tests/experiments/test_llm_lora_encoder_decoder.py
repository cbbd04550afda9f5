"""The study on language models with an encoder-decoder: each command, and what is refused."""

import io
import json
import sys

import numpy as np
import pytest

import lora_jax
from experiments.llm_lora import main
from experiments.models.names import huggingface_rules
from experiments.models.pretrained import LanguageModel
from lora_jax.exchange import peft
from tests import tiny_t5
from tests.agreement import assert_agree
from tests.experiments.conftest import promotion_of_users
from tests.experiments.small_llm_study import (
    ANSWERS,
    assert_same,
    lines,
    restored,
    write_encoder_decoder,
    write_lines,
    write_study,
)

for module in ("safetensors", "tokenizers", "jinja2"):
    pytest.importorskip(module)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

# Of an encoder attention and a gated feed-forward layer, of a decoder attention twice.
KERNELS = 7 * tiny_t5.LAYERS + 11 * (tiny_t5.LAYERS + 1)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    with promotion_of_users():
        return write_study(tmp_path_factory.mktemp("study"), write_encoder_decoder)


@pytest.fixture(scope="module")
def out(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with promotion_of_users():
        assert main([*arguments, "--epochs", "12", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def metrics(out):
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture
def adapter(out):
    return ["--adapter", str(out / "adapter")]


def test_the_answers_are_learned(metrics):
    held_out = metrics["held_out"]
    assert metrics["frozen_unchanged"] is True
    assert metrics["fullness"] > 0.3
    assert held_out["on"]["loss"] < 0.2 * held_out["off"]["loss"]
    assert held_out["merged"]["loss"] == pytest.approx(held_out["on"]["loss"], abs=1e-4)


def test_adapters_are_on_every_linear_layer_and_in_a_folder_of_peft(arguments, out):
    model, params, wrapped = restored(arguments, out)
    rules = huggingface_rules(model.config)
    assert_same(peft.load(out / "peft", params, names=rules), wrapped)
    config = peft.read_config(out / "peft")
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert len(config["target_modules"]) == KERNELS


def test_the_folder_of_peft_computes_the_same_in_transformers(arguments, out):
    torch = pytest.importorskip("torch")
    transformers, theirs = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model, _, wrapped = restored(arguments, out)
    inputs, tokens = tiny_t5.tokens(), tiny_t5.decoder_tokens()
    ours = lora_jax.adapt(model.network().apply)({"params": wrapped}, inputs, tokens)
    base = transformers.T5ForConditionalGeneration.from_pretrained(model.path)
    adapted = theirs.PeftModel.from_pretrained(base, out / "peft").eval()
    with torch.no_grad():
        expected = adapted(
            input_ids=torch.tensor(inputs, dtype=torch.long),
            decoder_input_ids=torch.tensor(tokens, dtype=torch.long),
        ).logits
    assert_agree(ours, expected.numpy(), tolerance=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "full", "--learning-rate", "0.01"],
        ["--method", "dora", "--no-packing"],
        ["--quantize", "nf4", "--no-remat"],
    ],
    ids=" ".join,
)
def test_other_ways_to_train(arguments, tmp_path, options):
    short = [*arguments, "--epochs", "2", *options, "--no-plots", "--out", str(tmp_path)]
    assert main(short) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["held_out"]["on"]["loss"] < 0.8 * metrics["held_out"]["off"]["loss"]


def test_preferences_are_learned(arguments, tmp_path):
    pairs = [
        {"prompt": asked["content"], "chosen": answer["content"], "rejected": "nothing"}
        for asked, answer in (each["messages"] for each in lines(40))
    ]
    data = ["--data", str(write_lines(tmp_path / "pairs.jsonl", pairs)), "--objective", "dpo"]
    options = ["--epochs", "4", "--learning-rate", "0.005", "--no-plots", "--out", str(tmp_path)]
    assert main([*arguments, *data, *options]) == 0
    held_out = json.loads((tmp_path / "metrics.json").read_text())["held_out"]
    assert held_out["off"]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert held_out["on"]["loss"] < 0.5 * np.log(2)


def test_a_mesh_of_devices_computes_the_same(arguments, tmp_path):
    options = ("--batch-size", "8", "--accumulate", "1", "--epochs", "2", "--no-plots")
    options += ("--soft-prompt", "4")
    losses = {}
    for name, mesh in {"one": [], "eight": ["--mesh", "data=2,fsdp=2,tensor=2"]}.items():
        assert main([*arguments, *options, *mesh, "--out", str(tmp_path / name)]) == 0
        losses[name] = json.loads((tmp_path / name / "metrics.json").read_text())["losses"]
    np.testing.assert_allclose(losses["eight"], losses["one"], rtol=1e-4)


def test_it_writes_what_it_has_learned(adapter, capsys):
    prompts = [word for each in ANSWERS for word in ("--prompt", f"{each}?")]
    assert main(["generate", *adapter, *prompts, "--new-tokens", "8"]) == 0
    assert capsys.readouterr().out.splitlines() == list(ANSWERS.values())


def test_several_adapters_answer_in_one_batch(arguments, out, adapter, tmp_path, capsys):
    other = tmp_path / "other"
    short = ["--epochs", "1", "--rank", "2", "--no-plots", "--out", str(other)]
    assert main([*arguments, *short]) == 0
    prompts = ["--prompt", "hello?", "--prompt", "world?", "--new-tokens", "8"]

    def answers(*chosen):
        capsys.readouterr()
        assert main(["generate", "--adapter", *chosen, *prompts]) == 0
        return [line.split(": ")[-1] for line in capsys.readouterr().out.splitlines()]

    adapters = [str(out / "adapter"), str(other / "adapter")]
    both = answers(*adapters)
    assert both[0::2] == answers(adapters[0]) == [ANSWERS["hello"], ANSWERS["world"]]
    assert both[1::2] == answers(adapters[1])


def test_it_chats(adapter, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello?\n\n"))
    assert main(["chat", *adapter, "--max-length", "100"]) == 0
    assert capsys.readouterr().out.splitlines() == [ANSWERS["hello"]]


def test_answers_are_compared_with_those_of_people(adapter, tmp_path, capsys):
    pytest.importorskip("rouge_score")
    test = write_lines(tmp_path / "test.jsonl", lines(10, seed=5))
    options = ["--data", str(test), "--new-tokens", "8", "--base", "--json"]
    assert main(["evaluate", *adapter, *options, "--out", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rouge"]["with its adapter"]["rouge1"]["mean"] == 1
    assert found["perplexity"]["with its adapter"] < 1.5 < found["perplexity"]["the model"]


def test_the_merged_model_is_a_folder(arguments, out, adapter, tmp_path):
    model, _, wrapped = restored(arguments, out)
    merged = tmp_path / "merged"
    assert main(["export", *adapter, "--to", "huggingface", "--out", str(merged)]) == 0
    read = LanguageModel.read(merged)
    assert read.config == model.config
    assert_agree(read.params(), lora_jax.merge(wrapped))


def test_what_is_refused(arguments, adapter, tmp_path, error_of):
    error = error_of(main, [*arguments, "--learn-prompts", "--out", str(tmp_path / "out")])
    assert "an encoder-decoder writes answers alone" in error
    export = ["export", *adapter, "--to", "gguf", "--out", str(tmp_path / "adapter.gguf")]
    assert "is an encoder-decoder; pass peft or huggingface" in error_of(main, export)
