"""The study on texts from its command line, with a tiny encoder: what it writes and refuses."""

import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax
from experiments.models.bert import Encoder
from experiments.text import training
from experiments.text.adapter_folder import AdapterFolder
from experiments.text.methods import METHODS, Method, without_adapters
from experiments.text_lora import main
from tests.experiments.interruptions import interrupted_after
from tests.tiny_bert import sentences_tsv, write_model

pytestmark = pytest.mark.slow

SMALL = ("--batch-size", "4", "--epochs", "2", "--evaluate-every", "3", "--max-length", "8")
SIZES = ("--train-examples", "16", "--validation-examples", "8")
SENTENCES = 48

KEYS = {
    *("dataset", "device", "seed", "description", "method", "rank", "training", "examples"),
    *("parameters", "accuracy", "loss", "predictions_as_on"),
    *("frozen_unchanged", "best", "steps", "classes"),
    *("steps_per_second", "bytes", "peak_bytes", "step_bytes", "merge_seconds", "losses"),
    *("evaluations", "confusion", "seconds"),
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """Returns the options that name a tiny encoder and two files of sentences."""
    folder = tmp_path_factory.mktemp("text")
    model = write_model(folder / "model")
    for name, seed in (("train", 0), ("test", 1)):
        (folder / f"{name}.tsv").write_text(sentences_tsv(seed, count=SENTENCES))
    files = ("--train-file", str(folder / "train.tsv"), "--eval-file", str(folder / "test.tsv"))
    return ["--model", str(model), *files, *SMALL, *SIZES, "--class-names", "bad", "good"]


@pytest.fixture(scope="module")
def out(arguments, tmp_path_factory) -> Path:
    """Returns the folder of a finished run."""
    folder = tmp_path_factory.mktemp("study") / "out"
    options = ["--rank", "4", "--learning-rate", "0.02", "--epochs", "15", "--evaluate-every", "15"]
    sizes = ["--train-examples", "32", "--validation-examples", "16", "--max-length", "12"]
    assert main([*arguments, *options, *sizes, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def metrics(out) -> dict:
    return json.loads((out / "metrics.json").read_text())


def model_in(arguments) -> Path:
    return Path(arguments[arguments.index("--model") + 1])


def restored(arguments, folder: Path):
    """Returns the initial parameters without a head, and the adapter that a run left."""
    encoder = Encoder.read(model_in(arguments)).params
    head = {"kernel": np.zeros((24, 2), np.float32), "bias": np.zeros(2, np.float32)}
    wrapped = AdapterFolder(folder / "adapter").restore({"encoder": encoder, "classifier": head})
    return encoder, wrapped


def assert_same(one, other):
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(leaves) == len(others)
    for leaf, its_other in zip(leaves, others, strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(its_other).tobytes()


def test_a_run_writes_metrics_pictures_and_the_best_adapter(metrics, out):
    assert set(metrics) == KEYS
    assert metrics["dataset"].endswith("/train")
    assert metrics["examples"] == {"train": 32, "validation": 16, "test": SENTENCES}
    assert set(metrics["accuracy"]) == {"on", "off", "merged"}
    assert metrics["steps"] == len(metrics["losses"]) == 120
    assert [step for step, *_ in metrics["evaluations"]] == list(range(15, 121, 15))
    assert np.sum(metrics["confusion"]) == SENTENCES
    assert metrics["bytes"]["adapter"] > 0
    for picture in ("curves.png", "confusion.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_the_loss_falls_and_the_sentences_are_learned(metrics):
    assert np.mean(metrics["losses"][-8:]) < 0.5 * np.mean(metrics["losses"][:8])
    assert metrics["accuracy"]["on"] > max(0.7, metrics["accuracy"]["off"])


def test_the_best_adapter_is_that_of_the_best_evaluation(metrics):
    best = max(metrics["evaluations"], key=lambda found: (found[1], -found[2]))
    assert list(metrics["best"].values()) == best


def test_the_frozen_weights_are_bit_for_bit_those_of_the_file(metrics, arguments, out):
    assert metrics["frozen_unchanged"] is True
    encoder, wrapped = restored(arguments, out)
    assert_same(encoder, lora_jax.unwrap(wrapped)["encoder"])


def test_what_trains_is_the_factors_of_query_and_value_and_the_head(metrics):
    factors = 2 * 2 * (24 * 4 + 4 * 24)
    assert metrics["parameters"]["trainable"] == factors + 24 * 2 + 2


def test_merged_predictions_are_those_with_the_adapters(metrics):
    as_on = metrics["predictions_as_on"]
    assert as_on["on"] == as_on["merged"] == SENTENCES > as_on["off"]
    assert metrics["accuracy"]["merged"] == metrics["accuracy"]["on"]


def test_an_interrupted_run_ends_as_an_unbroken_one_to_the_bit(arguments, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = [*arguments, "--rank", "2", "--adapter-dropout", "0.1", "--no-plots"]
    assert main([*options, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        interrupted_after(training.Training, 4, patch)
        assert main([*options, "--out", str(broken)]) == 130
    assert main([*options, "--out", str(broken), "--resume"]) == 0
    found = [json.loads((out / "metrics.json").read_text()) for out in (whole, broken)]
    for name in ("losses", "evaluations", "best", "accuracy", "confusion", "steps"):
        assert found[0][name] == found[1][name]
    assert_same(restored(arguments, whole)[1], restored(arguments, broken)[1])


def test_resume_refuses_other_settings_and_a_folder_without_a_checkpoint(
    arguments, tmp_path, monkeypatch, capsys
):
    options = [*arguments, "--rank", "2", "--no-plots", "--out", str(tmp_path)]
    assert main([*options, "--resume"]) == 2
    assert "--resume finds no checkpoint" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        interrupted_after(training.Training, 1, patch)
        assert main(options) == 130
    for other in (["--learning-rate", "0.5"], ["--rank", "3"], ["--seed", "1"], ["--epochs", "3"]):
        assert main([*options, *other, "--resume"]) == 2
        assert "error: " in capsys.readouterr().err


def test_predict_prints_label_probability_and_sentence(out, capsys):
    adapter = ["predict", "--adapter", str(out / "adapter")]
    assert main([*adapter, "--text", "the film is great", "--text", "a dull plot"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["good", "bad"]
    assert all(0.5 <= float(line[1]) <= 1 for line in lines)
    assert [line[2] for line in lines] == ["the film is great", "a dull plot"]


def test_predict_reads_standard_input(out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the film is great\n\n a dull plot \n"))
    assert main(["predict", "--adapter", str(out / "adapter"), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["label"] for each in found] == ["good", "bad"]
    assert [each["text"] for each in found] == ["the film is great", "a dull plot"]


def test_predict_refuses_what_does_not_fit(out, tmp_path, monkeypatch, capsys):
    adapter = ["predict", "--adapter", str(out / "adapter")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert main(adapter) == 2
    assert "there is no sentence" in capsys.readouterr().err
    assert main(["predict", "--adapter", str(tmp_path), "--text", "a film"]) == 2
    assert "is not the folder of an adapter" in capsys.readouterr().err
    from tests.tiny_bert import CONFIG, tensors

    other = write_model(tmp_path / "other", weights=tensors(CONFIG, seed=9))
    assert main([*adapter, "--model", str(other), "--text", "a film"]) == 2
    assert "are not those that the adapter was trained beside" in capsys.readouterr().err


def test_a_comparison_prints_means_over_seeds_and_keeps_finished_cells(arguments, tmp_path, capsys):
    options = ["--method", *METHODS, "--rank", "2", "--seeds", "2", "--epochs", "1", "--json"]
    command = [*arguments, *options, "--out", str(tmp_path)]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in first["methods"]] == [
        *("LoRA, rank 2", "DoRA, rank 2", "full fine-tuning", "head alone")
    ]
    for row in first["methods"]:
        assert row["mean"] == pytest.approx(np.mean(row["accuracies"]))
        assert row["deviation"] == pytest.approx(np.std(row["accuracies"], ddof=1))
    trainable = [row["trainable"] for row in first["methods"]]
    assert trainable[3] == 24 * 2 + 2 < trainable[0] < trainable[1] < trainable[2]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert main(command) == 0
    again = capsys.readouterr()
    second = json.loads(again.out)
    del first["seconds"], second["seconds"]
    assert second == first
    assert "Training" not in again.err


def test_only_the_head_trains_with_method_head(arguments):
    encoder = Encoder.read(model_in(arguments))
    params = {"encoder": encoder.params, "classifier": {"bias": np.zeros(2, np.float32)}}
    wrapped = Method("head", None).wrapped(params, None, targets=(), alpha=None, key=None)
    assert len(jax.tree.leaves(lora_jax.split(wrapped)[0])) == 1
    assert_same(without_adapters(wrapped), params)


def test_all_linear_adapts_every_kernel_of_the_encoder(arguments, tmp_path):
    options = ["--targets", "all-linear", "--rank", "2", "--epochs", "1", "--no-plots"]
    assert main([*arguments, *options, "--out", str(tmp_path)]) == 0
    _, wrapped = restored(arguments, tmp_path)
    layer = wrapped["encoder"]["layer_1"]
    kernels = [*(layer["attention"][name]["kernel"] for name in ("query", "key", "value", "out"))]
    kernels += [layer["up"]["kernel"], layer["down"]["kernel"]]
    assert all(isinstance(kernel, lora_jax.LoRAWeight) for kernel in kernels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "'0' is not a whole number of at least 1"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--targets", "qery"], "qery"),
        (["--rank", "99"], "rank"),
        (["--adapter-dropout", "1"], "below 1"),
        (["--train-examples", "few"], "few"),
        (["--train-examples", "41"], "--train-examples 41 is more than the 40 there are"),
        (["--validation-examples", "49"], "--validation-examples 49 is more than the 48"),
        (["--max-length", "21"], "--max-length 21"),
        (["--class-names", "one"], "expected 2 names"),
        (["--batch-size", "17"], "--batch-size 17"),
        (["--train-file", "absent.tsv"], "absent.tsv can't be read"),
        (["--model", "absent"], "--model absent is not a folder"),
        (["--seeds", "2", "--resume"], "--resume goes with a single training"),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments, tmp_path, error_of, options, message):
    assert message in error_of(main, [*arguments, "--out", str(tmp_path / "out"), *options])


def test_help_tells_of_both_commands(capsys):
    assert main(["--help"]) == 0
    assert "--resume" in capsys.readouterr().out
    assert main(["predict", "--help"]) == 0
    assert "standard input" in capsys.readouterr().out


@pytest.mark.slow
def test_from_the_shell_standard_output_is_json_alone(arguments, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "experiments.text_lora", *arguments]
    options = ["--epochs", "1", "--rank", "2", "--json", "--out", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "metrics.json").read_text())
    assert done.stderr.startswith("JAX ")
