"""The study with soft prompts, alone and beside LoRA, with each kind of model."""

import json

import numpy as np
import pytest

import lora_jax
from experiments.llm.adapter_folder import AdapterFolder
from experiments.llm.soft_prompt import with_prompt
from experiments.llm_lora import main
from tests.agreement import assert_agree
from tests.experiments.conftest import promotion_of_users
from tests.experiments.small_llm_study import (
    ANSWERS,
    model_in,
    write_encoder_decoder,
    write_model,
    write_study,
)

for module in ("safetensors", "tokenizers", "jinja2"):
    pytest.importorskip(module)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated",
        "ignore:Input and output embeddings are no longer tied",
    ),
]

COUNT = 4
KINDS = {"llama": write_model, "t5": write_encoder_decoder}


@pytest.fixture(scope="module", params=sorted(KINDS))
def arguments(request, tmp_path_factory):
    with promotion_of_users():
        return write_study(tmp_path_factory.mktemp("study"), KINDS[request.param])


PROMPT = ("--soft-prompt", str(COUNT))
WAYS = {"alone": ("--method", "none", "--epochs", "12"), "with LoRA": ("--epochs", "6")}


@pytest.fixture(scope="module", params=sorted(WAYS))
def run(request, arguments, tmp_path_factory):
    """Returns the way, the folder of a training, and its arguments."""
    folder = tmp_path_factory.mktemp("run")
    given = [*arguments, *PROMPT, *WAYS[request.param], "--no-plots", "--out", str(folder)]
    with promotion_of_users():
        assert main(given) == 0
    return request.param, folder, given


def test_a_prompt_learns(run, arguments):
    way, out, _ = run
    metrics = json.loads((out / "metrics.json").read_text())
    held_out = metrics["held_out"]
    assert held_out["on"]["loss"] < (0.8 if way == "alone" else 0.3) * held_out["off"]["loss"]
    assert held_out["merged"]["loss"] == pytest.approx(held_out["on"]["loss"], abs=1e-4)
    assert metrics["frozen_unchanged"] is True
    model = model_in(arguments)
    width = model.shapes()["embed"]["embedding"].shape[1]
    trainable = metrics["parameters"]["trainable"]
    assert trainable == COUNT * width if way == "alone" else trainable > COUNT * width


def test_what_is_off_is_the_model_as_it_was(run, arguments, tmp_path):
    _, out, _ = run
    plain = [*arguments, "--epochs", "1", "--no-plots", "--out", str(tmp_path)]
    assert main(plain) == 0
    off, expected = (
        json.loads((folder / "metrics.json").read_text())["held_out"]["off"]["loss"]
        for folder in (out, tmp_path)
    )
    assert off == pytest.approx(expected, rel=1e-4)


def test_it_writes_with_its_prompt(run, capsys):
    way, out, _ = run
    prompts = [word for each in ANSWERS for word in ("--prompt", f"{each}?")]
    adapter = ["--adapter", str(out / "adapter"), "--new-tokens", "8"]
    assert main(["generate", *adapter, *prompts]) == 0
    written = capsys.readouterr().out.splitlines()
    assert len(written) == len(ANSWERS)
    if way == "with LoRA":
        right = sum(one == other for one, other in zip(written, ANSWERS.values(), strict=True))
        assert right >= 3


def test_peft_computes_the_same(run, arguments):
    """With the adapters merged first, where there are some: PEFT has one kind at a time."""
    torch = pytest.importorskip("torch")
    transformers, theirs = pytest.importorskip("transformers"), pytest.importorskip("peft")
    way, out, _ = run
    model = model_in(arguments)
    is_t5 = model.config.model_type == "t5"
    base = with_prompt(model.params(), COUNT)
    wrapped = AdapterFolder(out / "adapter").restore(base)
    tokens = np.random.default_rng(0).integers(2, 200, (2, 9), np.int32)
    prompted = np.concatenate([np.tile(-1 - np.arange(COUNT), (2, 1)), tokens], axis=1)
    network = model.network(prompt_length=COUNT)
    inputs = (prompted.astype(np.int32), *([tokens] if is_t5 else []))
    ours = lora_jax.adapt(network.apply)({"params": wrapped}, *inputs)
    kind = transformers.AutoModelForSeq2SeqLM if is_t5 else transformers.AutoModelForCausalLM
    loaded = kind.from_pretrained(model.path)
    folder = out / "peft"
    if way == "with LoRA":
        loaded = theirs.PeftModel.from_pretrained(loaded, folder).merge_and_unload()
        folder = out / "peft_prompt"
    with_theirs = theirs.PeftModel.from_pretrained(loaded, folder).eval()
    given = {"input_ids": torch.tensor(tokens, dtype=torch.long)}
    if is_t5:
        given["decoder_input_ids"] = given["input_ids"]
    with torch.no_grad():
        expected = with_theirs(**given).logits.numpy()
    assert_agree(np.asarray(ours)[:, -expected.shape[1] :], expected, tolerance=1e-4)


def test_a_training_starts_from_a_folder_of_peft(run, arguments, tmp_path):
    way, out, _ = run
    folder = out / ("peft" if way == "alone" else "peft_prompt")
    options = ["--method", "none", *PROMPT, "--soft-prompt-from", str(folder), "--epochs", "1"]
    assert main([*arguments, *options, "--no-plots", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())["held_out"]
    if way == "alone":
        before = json.loads((out / "metrics.json").read_text())["held_out"]["on"]["loss"]
        assert found["on"]["loss"] < 1.1 * before


def test_what_a_prompt_refuses(run, arguments, error_of, tmp_path):
    _, out, _ = run
    wrong = [*arguments, "--out", str(tmp_path / "out")]
    assert "--method none trains nothing; pass --soft-prompt" in error_of(
        main, [*wrong, "--method", "none"]
    )
    assert "pass --soft-prompt" in error_of(main, [*wrong, "--soft-prompt-from", "hello"])
    adapter = ["--adapter", str(out / "adapter")]
    for name in ("gguf", "huggingface"):
        export = ["export", *adapter, "--to", name, "--out", str(tmp_path / name)]
        assert f"has a soft prompt, for which --to {name} has no place" in error_of(main, export)
    several = ["generate", *adapter, adapter[1], "--prompt", "hello?"]
    assert "one of these adapters has a soft prompt" in error_of(main, several)
