"""The study on language models: training, resuming, and what it refuses."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import lora_jax
from experiments.common.files import used_alone
from experiments.llm import training
from experiments.llm_lora import main
from experiments.models.names import huggingface_rules
from lora_jax.exchange import peft
from tests import tiny_llama
from tests.experiments.interruptions import interrupted_after
from tests.experiments.small_llm_study import assert_same, lines, restored, write_lines

KEYS = {
    *(
        "data",
        "model",
        "device",
        "description",
        "method",
        "rank",
        "soft_prompt",
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


@pytest.fixture
def arguments(llm_arguments):
    return llm_arguments


@pytest.fixture
def out(llm_out):
    return llm_out


@pytest.fixture(scope="module")
def metrics(llm_out):
    return json.loads((llm_out / "metrics.json").read_text())


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


def preferences():
    return [
        {
            "prompt": example["messages"][0]["content"],
            "chosen": example["messages"][1]["content"],
            "rejected": "nothing",
        }
        for example in lines(40)
    ]


def test_preferences_are_learned(arguments, tmp_path):
    data = [
        "--data",
        str(write_lines(tmp_path / "pairs.jsonl", preferences())),
        "--objective",
        "dpo",
    ]
    options = ["--epochs", "3", "--learning-rate", "0.005", "--beta", "0.2", "--no-plots"]
    assert main([*arguments, *data, *options, "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    held_out = metrics["held_out"]
    assert held_out["off"]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert held_out["on"]["loss"] < 0.5 * np.log(2)
    assert held_out["on"]["accuracy"] == 1


@pytest.fixture(scope="module")
def on_one_device(llm_arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    assert main([*llm_arguments, *EIGHT_ROWS, "--out", str(out)]) == 0
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


def test_an_interrupted_run_ends_as_an_unbroken_one_to_the_bit(
    arguments, out, metrics, tmp_path, monkeypatch
):
    options = [*arguments, "--no-plots", "--out", str(tmp_path)]
    for steps, resume in ((3, []), (13, ["--resume"])):
        with monkeypatch.context() as patch:
            interrupted_after(training.Training, steps, patch)
            assert main([*options, *resume]) == 130
    assert main([*options, "--resume"]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("losses", "evaluations", "best", "held_out"):
        assert found[name] == metrics[name]
    assert_same(restored(arguments, tmp_path)[2], restored(arguments, out)[2])


def command(arguments, out):
    run = [sys.executable, "-W", "error", "-m", "experiments.llm_lora", *arguments]
    return [*run, "--no-plots", "--json", "--out", str(out)]


def test_a_killed_run_goes_on_and_prints_json_alone(arguments, out, metrics, tmp_path):
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
    # The other run was in this process, whose programs are for eight devices.
    np.testing.assert_allclose(found["losses"], metrics["losses"], rtol=1e-5)


def test_resume_refuses_other_settings_and_other_data(arguments, tmp_path, monkeypatch, error_of):
    options = [*arguments, "--no-plots", "--out", str(tmp_path)]
    assert "--resume finds no checkpoint" in error_of(main, [*options, "--resume"])
    with monkeypatch.context() as patch:
        interrupted_after(training.Training, 1, patch)
        assert main(options) == 130
    error = error_of(main, [*options, "--learning-rate", "0.5", "--resume"])
    assert "--learning-rate is 0.5, but the training to continue has 0.02" in error
    other = write_lines(tmp_path / "other.jsonl", lines(80, seed=1))
    error = error_of(main, [*options, "--data", str(other), "--resume"])
    assert "pass the data that it began with" in error


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
