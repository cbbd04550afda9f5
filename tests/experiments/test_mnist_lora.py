"""The MNIST study from its command line, on small digits: what it writes, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lora_jax
from experiments import mnist_lora
from experiments.mnist.network import initial_params
from experiments.mnist.options import Options
from experiments.mnist_lora import main, with_adapters

SMALL = ("--data", "digits", "--batch-size", "50", "--finetune-batches", "6")

KEYS = {
    "dataset": str,
    "device": str,
    "seed": int,
    "rank": int,
    "alpha": float,
    "digit": int,
    "parameters": {"original", "added", "total", "percent"},
    "base": {"accuracy", "wrong_counts"},
    "adapted": {"accuracy", "wrong_counts"},
    "disabled": {"accuracy", "wrong_counts"},
    "merged": {"accuracy", "wrong_counts"},
    "restored": {"accuracy", "wrong_counts"},
    "frozen_unchanged": bool,
    "max_weight_error": float,
    "bytes": {"adapter", "model"},
    "seconds": None,
    "milliseconds": {"base", "adapted", "merged"},
}


@pytest.fixture(scope="module")
def from_shell(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Returns the folder of a finished run of the command itself, and what it printed."""
    folder = tmp_path_factory.mktemp("study") / "out"
    command = [sys.executable, "-W", "error", "-m", "experiments.mnist_lora", *SMALL]
    done = subprocess.run(
        [*command, "--json", "--out", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        # As the tests themselves run, to the last bit.
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"},
    )
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def out(from_shell) -> Path:
    return from_shell[0]


@pytest.fixture
def metrics(out) -> dict:
    return metrics_in(out)


@pytest.fixture(autouse=True)
def few_timing_rounds(monkeypatch):
    monkeypatch.setattr(mnist_lora, "_INFERENCE_ROUNDS", 2)


def metrics_in(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def test_from_the_shell_standard_output_is_json_alone_and_tables_go_beside_it(from_shell):
    out, done = from_shell
    assert json.loads(done.stdout) == metrics_in(out)
    assert done.stderr.startswith("JAX ")
    assert "6,794" in done.stderr
    assert "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) < 80


def test_metrics_have_exactly_the_documented_keys(metrics):
    assert set(metrics) == set(KEYS)
    for key, expected in KEYS.items():
        if isinstance(expected, set):
            assert set(metrics[key]) == expected
        elif expected is not None:
            assert isinstance(metrics[key], expected)
    assert metrics["dataset"] == "digits"
    assert all(seconds >= 0 for seconds in metrics["seconds"].values())


def test_the_counts_are_those_of_the_network(metrics):
    parameters = metrics["parameters"]
    assert parameters.pop("percent") == pytest.approx(0.242, abs=5e-4)
    assert parameters == {"original": 2_807_010, "added": 6_794, "total": 2_813_804}


def test_every_claim_holds(metrics):
    assert metrics["disabled"] == metrics["base"]
    assert metrics["merged"] == metrics["adapted"]
    assert metrics["restored"] == metrics["adapted"]
    assert metrics["adapted"] != metrics["base"]
    assert metrics["frozen_unchanged"] is True
    assert 0 < metrics["max_weight_error"] < 1e-5
    assert 100 * metrics["bytes"]["adapter"] < metrics["bytes"]["model"]


def test_the_tuned_digit_is_the_hardest_and_gets_better(metrics):
    digit, before = metrics["digit"], metrics["base"]["wrong_counts"]
    assert before[digit] == max(before)
    assert metrics["adapted"]["wrong_counts"][digit] < before[digit]


def test_the_folder_holds_what_it_should_and_no_leftovers(out):
    names = {path.name for path in out.iterdir()}
    pictures = {"wrong_counts.png", "loss.png"}
    assert names == {"metrics.json", "base_checkpoint", "adapter_checkpoint", *pictures}


def test_a_second_run_reuses_the_base_and_gives_the_same_numbers(out, metrics, capsys):
    assert main([*SMALL, "--out", str(out), "--no-plots"]) == 0
    assert "Base network: reused" in capsys.readouterr().out
    again = metrics_in(out)
    for changing in ("seconds", "milliseconds", "bytes"):
        del again[changing], metrics[changing]
    assert again == metrics


def test_training_again_gives_the_same_numbers_too(out, metrics, capsys):
    assert main([*SMALL, "--out", str(out), "--no-plots", "--retrain"]) == 0
    assert "Base network: reused" not in capsys.readouterr().out
    again = metrics_in(out)
    for same in ("base", "adapted", "max_weight_error"):
        assert again[same] == metrics[same]


def test_options_reach_the_adapters(tmp_path):
    out = tmp_path / "out"
    options = ["--rank", "2", "--alpha", "4", "--targets", "hidden_2", "output", "--digit", "3"]
    assert main([*SMALL, *options, "--replay", "0.5", "--no-plots", "--out", str(out)]) == 0
    metrics = metrics_in(out)
    assert (metrics["rank"], metrics["alpha"], metrics["digit"]) == (2, 4.0, 3)
    assert metrics["parameters"]["added"] == 2 * (1000 + 2000) + 2 * (2000 + 10)
    restored = lora_jax.restore(
        out / "adapter_checkpoint", initial_params(seed=0), check_base=False
    )
    assert float(restored["hidden_2"]["kernel"].scale) == 2
    assert not (out / "loss.png").exists()


def test_factors_start_standard_normal_and_zero():
    kernel = with_adapters(initial_params(seed=0), Options())["hidden_2"]["kernel"]
    assert np.std(kernel.lora_A) == pytest.approx(1, abs=0.1)
    assert not np.any(kernel.lora_B)


def test_interrupting_keeps_the_finished_base_and_leaves_nothing_half_written(
    tmp_path, monkeypatch, capsys
):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(mnist_lora, "finetuned", interrupted)
    assert main([*SMALL, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "error: interrupted; what was finished is kept\n"
    assert [path.name for path in tmp_path.iterdir()] == ["base_checkpoint"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "argument --rank"),
        (["--rank", "-1"], "argument --rank"),
        (["--rank", "1.5"], "argument --rank"),
        (["--rank", "11"], "output/kernel"),
        (["--alpha", "0"], "argument --alpha"),
        (["--targets", "hiden_1"], "hidden_1"),
        (["--targets", "bias"], "bias"),
        (["--targets", "hidden_("], "hidden_("),
        (["--digit", "11"], "argument --digit"),
        (["--digit", "x"], "argument --digit"),
        (["--replay", "1.5"], "argument --replay"),
        (["--seed", "-1"], "argument --seed"),
        (["--batch-size", "0"], "argument --batch-size"),
        (["--batch-size", "5000"], "--batch-size 5000"),
        (["--learning-rate", "0"], "argument --learning-rate"),
        (["--data", "cifar"], "argument --data"),
        (["--mnist-dir", "nowhere"], "argument --mnist-dir"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments, message, tmp_path, monkeypatch, error_of):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(main, ["--data", "digits", "--out", "out", *arguments])
    assert not list(tmp_path.glob("out/*"))


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, error_of):
    (tmp_path / "file").write_text("")
    assert "--out" in error_of(main, ["--data", "digits", "--out", str(tmp_path / "file")])


def test_help_explains_every_option(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--rank", "--replay", "--mnist-dir", "--retrain", "examples:"):
        assert option in shown
