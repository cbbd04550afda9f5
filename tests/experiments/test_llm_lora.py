"""The study on language models: training, resuming, what it writes, and what it refuses."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax
from experiments.common.errors import InputError
from experiments.common.files import used_alone
from experiments.llm import training
from experiments.llm.adapter_folder import AdapterFolder
from experiments.llm.answers import Writer
from experiments.llm.chatting import Answerer, ChatOptions
from experiments.llm_lora import main
from experiments.models.llama import LanguageModel, huggingface_rules
from lora_jax.exchange import peft
from tests import tiny_llama
from tests.tiny_tokenizer import BEGIN, END, TEMPLATE, trained

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("gguf")

KEYS = {
    *(
        "data",
        "model",
        "device",
        "method",
        "rank",
        "quantize",
        "dtype",
        "mesh",
        "training",
        "examples",
    ),
    *("fullness", "parameters", "held_out", "best", "frozen_unchanged", "steps", "losses"),
    *("steps_per_second", "tokens_per_second", "adapter_bytes", "peak_bytes", "step_bytes"),
    *("evaluations", "seconds"),
}
ANSWERS = {"hello": "the world", "world": "hello there", "other": "the other", "there": "world"}


def lines(count, seed=0):
    random = np.random.default_rng(seed)
    for word in random.choice(list(ANSWERS), count):
        question = {"role": "user", "content": f"{word}?"}
        yield {"messages": [question, {"role": "assistant", "content": ANSWERS[word]}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a tiny model, its tokenizer, and a file of examples."""
    folder = tmp_path_factory.mktemp("llm")
    model = folder / "model"
    tiny_llama.write_folder(model, "llama")
    trained()[0].save(str(model / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "eos_token": END, "bos_token": BEGIN}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, lines(80))))
    return folder


@pytest.fixture(scope="module")
def arguments(folder):
    return [
        *("--model", str(folder / "model"), "--data", str(folder / "examples.jsonl")),
        *("--max-length", "48", "--validation-examples", "16", "--rank", "4", "--epochs", "6"),
        *("--batch-size", "2", "--accumulate", "2", "--evaluate-every", "10"),
        *("--learning-rate", "0.02"),
    ]


@pytest.fixture(scope="module")
def out(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main([*arguments, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def restored(arguments, out):
    model = LanguageModel.read(Path(arguments[arguments.index("--model") + 1]))
    params = model.params()
    return model, params, AdapterFolder(out / "adapter").restore(params)


def assert_same(one, other):
    for leaf, its_other in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(its_other).tobytes()


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_writes_metrics_a_picture_and_the_best_adapter(metrics, out):
    assert set(metrics) == KEYS
    assert metrics["examples"] == {"train": 64, "validation": 16, "cut": 0, "dropped": 0}
    assert metrics["steps"] == len(metrics["losses"])
    assert metrics["frozen_unchanged"] is True
    assert metrics["fullness"] > 0.7
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    best = min(metrics["evaluations"], key=lambda found: found["loss"])
    assert metrics["best"] == best
    assert metrics["held_out"]["on"]["loss"] == pytest.approx(best["loss"], rel=1e-5)


def test_the_answers_are_learned(metrics):
    held_out = metrics["held_out"]
    assert held_out["on"]["loss"] < 0.2 * held_out["off"]["loss"]
    assert held_out["merged"]["loss"] == pytest.approx(held_out["on"]["loss"], abs=1e-4)
    assert held_out["on"]["perplexity"] == pytest.approx(np.exp(held_out["on"]["loss"]))


def test_adapters_are_on_every_linear_layer_and_in_a_folder_of_peft(arguments, out, metrics):
    model, params, wrapped = restored(arguments, out)
    adapted = lora_jax.count_parameters(wrapped).trainable
    assert adapted == metrics["parameters"]["trainable"]
    rules = huggingface_rules(model.config)
    assert_same(peft.load(out / "peft", params, names=rules), wrapped)
    config = peft.read_config(out / "peft")
    assert config["task_type"] == "CAUSAL_LM"
    assert len(config["target_modules"]) == 7 * tiny_llama.LAYERS


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "full", "--learning-rate", "0.01"],
        ["--method", "dora", "--no-packing"],
        ["--quantize", "int8", "--no-remat"],
        ["--dtype", "bfloat16"],
    ],
    ids=" ".join,
)
def test_other_ways_to_train(arguments, tmp_path, options):
    short = [*arguments, "--epochs", "2", *options, "--no-plots", "--out", str(tmp_path)]
    assert main(short) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["held_out"]["on"]["loss"] < 0.8 * metrics["held_out"]["off"]["loss"]
    assert (tmp_path / "peft").exists() == (options[1] != "full")


def preferences(path, count=40):
    entries = [
        {
            "prompt": example["messages"][0]["content"],
            "chosen": example["messages"][1]["content"],
            "rejected": "nothing",
        }
        for example in lines(count)
    ]
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def test_preferences_are_learned(arguments, tmp_path):
    data = ["--data", str(preferences(tmp_path / "pairs.jsonl")), "--objective", "dpo"]
    options = ["--epochs", "3", "--learning-rate", "0.005", "--beta", "0.2", "--no-plots"]
    assert main([*arguments, *data, *options, "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    held_out = metrics["held_out"]
    assert held_out["off"]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert held_out["on"]["loss"] < 0.5 * np.log(2)
    assert held_out["on"]["accuracy"] == 1


@pytest.fixture(scope="module")
def on_one_device(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    assert main([*arguments, *EIGHT_ROWS, "--out", str(out)]) == 0
    return json.loads((out / "metrics.json").read_text())


EIGHT_ROWS = ("--batch-size", "8", "--accumulate", "1", "--epochs", "2", "--no-plots")


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "fsdp=8"])
def test_a_mesh_of_devices_computes_the_same(arguments, tmp_path, on_one_device, mesh):
    assert main([*arguments, *EIGHT_ROWS, "--mesh", mesh, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    np.testing.assert_allclose(found["losses"], on_one_device["losses"], rtol=1e-4)
    losses = [each["held_out"]["on"]["loss"] for each in (found, on_one_device)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# --- interruptions -------------------------------------------------------------------------------


def interrupted_after(steps, monkeypatch):
    """Has the next training raise KeyboardInterrupt within a step, when so many are done."""
    take_step = training.Training._take_step

    def interrupting(self, batch):
        if self.step == steps:
            self.history.add_step({"loss": 0.0})  # a trace of the step that is not finished
            raise KeyboardInterrupt
        take_step(self, batch)

    monkeypatch.setattr(training.Training, "_take_step", interrupting)


def test_an_interrupted_run_ends_as_an_unbroken_one_to_the_bit(
    arguments, out, metrics, tmp_path, monkeypatch
):
    options = [*arguments, "--no-plots", "--out", str(tmp_path)]
    for steps, resume in ((3, []), (13, ["--resume"])):
        with monkeypatch.context() as patch:
            interrupted_after(steps, patch)
            assert main([*options, *resume]) == 130
    assert main([*options, "--resume"]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("losses", "evaluations", "best", "held_out"):
        assert found[name] == metrics[name]
    assert_same(restored(arguments, tmp_path)[2], restored(arguments, out)[2])


def command(arguments, out):
    run = [sys.executable, "-W", "error", "-m", "experiments.llm_lora", *arguments]
    return [*run, "--no-plots", "--json", "--out", str(out)]


def test_a_killed_run_is_resumed_to_the_bit_and_prints_json_alone(
    arguments, out, metrics, tmp_path
):
    steps = tmp_path / "checkpoints"
    killed = subprocess.Popen(
        command(arguments, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while killed.poll() is None and not [path for path in steps.glob("*") if path.name.isdigit()]:
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    done = subprocess.run(
        [*command(arguments, tmp_path), "--resume"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Continuing from step" in done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "metrics.json").read_text())
    assert len(found["losses"]) == metrics["steps"]
    assert found["losses"] == metrics["losses"]
    assert_same(restored(arguments, tmp_path)[2], restored(arguments, out)[2])


def test_resume_refuses_other_settings_and_other_data(
    arguments, folder, tmp_path, monkeypatch, error_of
):
    options = [*arguments, "--no-plots", "--out", str(tmp_path)]
    assert "--resume finds no checkpoint" in error_of(main, [*options, "--resume"])
    with monkeypatch.context() as patch:
        interrupted_after(1, patch)
        assert main(options) == 130
    error = error_of(main, [*options, "--learning-rate", "0.5", "--resume"])
    assert "--learning-rate is 0.5, but the training to continue has 0.02" in error
    shorter = tmp_path / "other.jsonl"
    shorter.write_text((folder / "examples.jsonl").read_text().replace("hello?", "hi?"))
    error = error_of(main, [*options, "--data", str(shorter), "--resume"])
    assert "pass the data that it began with" in error


# --- writing -------------------------------------------------------------------------------------


def test_it_writes_what_it_has_learned(out, capsys):
    adapter = ["generate", "--adapter", str(out / "adapter"), "--new-tokens", "8"]
    prompts = [word for each in ANSWERS for word in ("--prompt", f"{each}?")]
    assert main([*adapter, *prompts]) == 0
    assert capsys.readouterr().out.splitlines() == list(ANSWERS.values())


def test_it_reads_standard_input_and_prints_json(out, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello?\n\nworld?\n"))
    drawn = ["--temperature", "0.01", "--top-p", "0.9", "--json", "--new-tokens", "8"]
    assert main(["generate", "--adapter", str(out / "adapter"), *drawn]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["prompt"] for each in found] == ["hello?", "world?"]
    assert [each["answer"] for each in found] == [ANSWERS["hello"], ANSWERS["world"]]
    plain = ["--plain", "--prompt", "the", "--new-tokens", "3"]
    assert main(["generate", "--model", str(folder / "model"), *plain]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_several_adapters_answer_in_one_batch(arguments, out, tmp_path, capsys):
    other = tmp_path / "other"
    short = ["--epochs", "1", "--rank", "2", "--no-plots", "--out", str(other)]
    assert main([*arguments, *short]) == 0
    adapters = [str(out / "adapter"), str(other / "adapter")]
    prompts = ["--prompt", "hello?", "--prompt", "world?", "--new-tokens", "8", "--json"]

    def answers(*chosen):
        capsys.readouterr()
        assert main(["generate", "--adapter", *chosen, *prompts]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    both = answers(*adapters)
    assert [each["adapter"] for each in both] == adapters * 2
    for place, adapter in enumerate(adapters):
        assert both[place::2] == answers(adapter)


def test_a_conversation_is_answered_line_by_line(out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello?\nworld?\n\nother?\n"))
    assert main(["chat", "--adapter", str(out / "adapter"), "--max-length", "100"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == ANSWERS["hello"]
    # The second answer comes after the first, which it can see.
    assert second


def test_an_answer_comes_in_pieces(out):
    options = ChatOptions(adapter=out / "adapter", max_length=100)
    answerer = Answerer(Writer.read(options.adapter, None), options)
    pieces = list(answerer.pieces([{"role": "user", "content": "world?"}]))
    assert "".join(pieces) == ANSWERS["world"]
    assert len(pieces) > 1
    long = [{"role": "user", "content": "hello " * 200}]
    with pytest.raises(InputError, match="there is room for 100"):
        list(answerer.pieces(long))


def test_what_writing_refuses(out, folder, tmp_path, error_of):
    assert "is not the folder of an adapter" in error_of(
        main, ["generate", "--adapter", str(tmp_path), "--prompt", "a"]
    )
    adapter = ["generate", "--adapter", str(out / "adapter"), "--prompt", "a"]
    assert "more than the 128" in error_of(main, [*adapter, "--new-tokens", "128"])
    other = tmp_path / "other"
    shutil.copytree(folder / "model", other)
    tiny_llama.write_folder(other, "llama", seed=1, overwrite=True)
    trained()[0].save(str(other / "tokenizer.json"))
    assert "base" in error_of(main, [*adapter, "--model", str(other)])


# --- what training refuses -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nothing.jsonl"], "nothing.jsonl can't be read"),
        (["--validation-examples", "80"], "has 80 examples; pass a smaller number, or more data"),
        (["--train-examples", "65"], "--train-examples is 65, and there are 64"),
        (["--max-length", "129"], "more than the 128 tokens that the model was made for"),
        (["--max-length", "4"], "are longer than 4 tokens; pass a larger --max-length"),
        (["--method", "full", "--quantize", "int8"], "which no optimiser updates"),
        (["--objective", "dpo"], "line 1 has the keys messages; expected an object with `prompt`"),
        (["--objective", "dpo", "--data", "dialogsum"], "dialogsum has no preferences"),
        (["--objective", "dpo", "--learn-prompts"], "goes with --objective sft"),
        (["--quantize", "as-stored"], "is a folder whose weights are not quantised"),
        (["--targets", "nothing"], "matches no leaf"),
        (["--rank", "65"], "65"),
        (["--mesh", "data=2,tensor=2"], "is for 4 devices, and there are 8"),
        (["--mesh", "data=8"], "--batch-size is 2, which data and fsdp of --mesh cut into 8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_writes_nothing(
    arguments, tmp_path, error_of, options, message
):
    error = error_of(main, [*arguments, *options, "--out", str(tmp_path / "out")])
    assert message in error
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_folder_that_another_training_uses(arguments, tmp_path, error_of):
    with used_alone(tmp_path, "--out"):
        error = error_of(main, [*arguments, "--out", str(tmp_path)])
        assert "is used by another run; wait for its end, or pass another folder" in error


def test_wrong_arguments(arguments, capsys):
    assert main([]) == 2
    assert "--data" in capsys.readouterr().err
    assert main([*arguments, "--mesh", "data=2,model=2"]) == 2
    assert "is not a mesh such as data=2,tensor=4" in capsys.readouterr().err
    assert main([*arguments, "--rank", "0"]) == 2
    assert "is not a whole number of at least 1" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "examples:" in capsys.readouterr().out


# --- evaluating ----------------------------------------------------------------------------------


def test_answers_are_compared_with_those_of_people(out, folder, tmp_path, capsys):
    pytest.importorskip("rouge_score")
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(map(json.dumps, lines(10, seed=5))))
    options = ["evaluate", "--data", str(test), "--new-tokens", "8", "--batch-size", "4", "--json"]
    options += ["--out", str(tmp_path / "out"), "--limit", "9"]
    assert main([*options, "--model", str(folder / "model")]) == 0
    alone = json.loads(capsys.readouterr().out)["rouge"]
    assert main([*options, "--adapter", str(out / "adapter"), "--base"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["answers"], results["references"]) == (9, 9)
    both = results["rouge"]
    assert both["the model"] == alone["the model"]
    assert both["the model"]["rouge1"]["mean"] < 0.5
    assert both["with its adapter"]["rouge1"] == {"mean": 1, "low": 1, "high": 1}
    assert 1 <= results["perplexity"]["with its adapter"] < 1.5 < results["perplexity"]["the model"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["rouge"] == both
    answers = (tmp_path / "out" / "answers.md").read_text()
    assert answers.count("**the model:**") == answers.count("## ") == 9
    assert "**with its adapter:** the world\n\n**People:**\n\n- the world\n" in answers


def test_summaries_are_compared_with_all_references(out, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rouge_score")
    entry = {"dialogue": "hello", "summary1": "a", "summary2": "b", "summary3": "c"}
    (tmp_path / "dialogsum.test.jsonl").write_text(json.dumps(entry))
    monkeypatch.setenv("DIALOGSUM_DIR", str(tmp_path))
    adapter = ["--adapter", str(out / "adapter"), "--out", str(tmp_path / "out"), "--json"]
    assert main(["evaluate", "--data", "dialogsum", "--new-tokens", "4", *adapter]) == 0
    assert json.loads(capsys.readouterr().out)["references"] == 3


def test_what_evaluating_refuses(out, tmp_path, error_of):
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    adapter = ["evaluate", "--adapter", str(out / "adapter"), "--out", str(tmp_path)]
    assert "line 1 has a `prompt`" in error_of(main, [*adapter, "--data", str(plain)])
    assert "can't be read" in error_of(main, [*adapter, "--data", str(tmp_path / "no.jsonl")])
    base = ["evaluate", "--data", "dialogsum", "--base", "--out", str(tmp_path)]
    assert "pass --adapter DIR with it" in error_of(main, base)


# --- exporting -----------------------------------------------------------------------------------


def test_other_programs_get_the_adapter(arguments, out, tmp_path, error_of):
    model, params, wrapped = restored(arguments, out)
    adapter = ["export", "--adapter", str(out / "adapter")]
    rules = huggingface_rules(model.config)
    assert main([*adapter, "--to", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert_same(peft.load(tmp_path / "peft", params, names=rules), wrapped)
    assert main([*adapter, "--to", "gguf", "--out", str(tmp_path / "adapter.gguf")]) == 0
    tensors = lora_jax.exchange.gguf.load(tmp_path / "adapter.gguf")
    assert len(tensors) == 2 * 7 * tiny_llama.LAYERS
    merged = tmp_path / "merged"
    assert main([*adapter, "--to", "huggingface", "--out", str(merged)]) == 0
    read = LanguageModel.read(merged)
    assert read.config == model.config
    assert_same(read.params(), lora_jax.merge(wrapped))
    text = "hello <|user|> world"
    np.testing.assert_array_equal(read.tokenizer().encoded(text), model.tokenizer().encoded(text))
    error = error_of(main, [*adapter, "--to", "huggingface", "--out", str(merged)])
    assert "holds a model" in error


def test_a_model_of_a_gguf_file_becomes_a_folder(tmp_path):
    _, tokens, merges = trained()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if each.startswith("<|") else 1 for each in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    tiny_llama.write_gguf(tmp_path / "model.gguf", "qwen2", metadata)
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, lines(12))))
    options = ["--model", str(tmp_path / "model.gguf"), "--data", str(tmp_path / "examples.jsonl")]
    short = ["--max-length", "32", "--validation-examples", "4", "--no-plots"]
    assert main([*options, *short, "--out", str(tmp_path / "out")]) == 0
    adapter = ["export", "--adapter", str(tmp_path / "out" / "adapter")]
    merged = tmp_path / "merged"
    assert main([*adapter, "--to", "huggingface", "--out", str(merged)]) == 0
    read, model = LanguageModel.read(merged), LanguageModel.read(tmp_path / "model.gguf")
    assert read.config == model.config
    messages = [{"role": "user", "content": "hello"}]
    np.testing.assert_array_equal(
        read.tokenizer().encoded_conversation(messages),
        model.tokenizer().encoded_conversation(messages),
    )
