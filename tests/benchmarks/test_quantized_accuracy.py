"""What formats cost in accuracy, small, and its tables."""

import json

import jax
import pytest

from benchmarks import quantized_accuracy
from experiments.data.images import load_images
from tests.tiny_bert import sentences_tsv, write_model


@pytest.mark.slow
def test_each_format_is_tuned_on_the_same_digit(tmp_path, monkeypatch):
    monkeypatch.setattr(
        quantized_accuracy, "load_images", lambda _, *others: load_images("digits", *others)
    )
    file = tmp_path / "found.json"
    formats = ("dense", "nf4", "fp8_e4m3")
    arguments = ["--study", "mnist", "--seeds", "1", "--out", str(tmp_path), "--json", str(file)]
    options = [part for name in formats for part in ("--format", name)]
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        assert quantized_accuracy.main([*arguments, *options]) == 0
    rows = json.loads(file.read_text())["studies"]["mnist"]
    assert [row["format"] for row in rows] == list(formats)
    assert len({row["digit"] for row in rows}) == 1
    for row in rows:
        assert row["the digit's, tuned"] < row["the digit's"]


@pytest.mark.slow
def test_each_format_trains_on_the_same_sentences(tmp_path, monkeypatch):
    for number, name in enumerate(("train", "test")):
        (tmp_path / f"{name}.tsv").write_text(sentences_tsv(number, count=48))
    files = [f"--train-file={tmp_path}/train.tsv", f"--eval-file={tmp_path}/test.tsv"]
    sizes = ["--train-examples=24", "--validation-examples=8", "--max-length=12"]
    training = ["--batch-size=4", "--evaluate-every=1", "--learning-rate=0.02"]
    model = f"--model={write_model(tmp_path / 'model')}"
    chosen = quantized_accuracy.text.parsed([model, *files, *sizes, *training])
    monkeypatch.setattr(quantized_accuracy.text, "parsed", lambda _: chosen)
    file = tmp_path / "found.json"
    arguments = ["--study", "text", "--seeds", "2", "--format", "dense", "--format", "int8"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert quantized_accuracy.main([*arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["studies"]["text"]
    found = [(row["format"], row["seed"]) for row in rows]
    assert found == [("dense", 0), ("dense", 1), ("int8", 0), ("int8", 1)]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_a_cell_is_the_mean_over_seeds_and_the_greatest_less_the_least():
    def row(name, seed, errors):
        return {"format": name, "seed": seed, "digit": 4, "errors": errors}

    rows = [row("dense", 0, 400), row("dense", 1, 410), row("nf4", 0, 401), row("nf4", 1, 401)]
    accuracies = [{"format": "dense", "seed": seed, "accuracy": 0.75 + seed / 4} for seed in (0, 1)]
    errors, accuracy = quantized_accuracy.tables(
        {"seeds": 2, "studies": {"mnist": rows, "text": accuracies}}
    )
    assert errors.header == ["format", "errors"]
    assert errors.rows == [["dense", "405.0 (10.0)"], ["nf4", "401.0 (0.0)"]]
    assert accuracy.rows == [["dense", "0.8750 (0.2500)"]]
