"""Several tasks on one encoder: what the example prints, and what it refuses."""

import json
from pathlib import Path

import pytest

from experiments import text_lora, two_tasks
from tests.tiny_bert import sentences_tsv, write_model

pytestmark = pytest.mark.slow

SENTENCES = ("the film is great", "a very dull plot", "good film")
SMALL = ("--batch-size", "4", "--epochs", "1", "--max-length", "12", "--no-plots")
SIZES = ("--train-examples", "16", "--validation-examples", "8", "--learning-rate", "0.05")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    """Returns the adapters of two tasks, of two and of three classes and of other ranks."""
    folder = tmp_path_factory.mktemp("tasks")
    model = write_model(folder / "model")
    praise = sentences_tsv(0, count=48)
    length = "\n".join(
        f"{text}\t{('short', 'medium', 'long')[min(len(text.split()) // 4, 2)]}"
        for text in (line.split("\t")[0] for line in praise.splitlines()[1:])
    )
    found = []
    for name, rank, lines in (("praise", 2, praise), ("length", 3, length)):
        (folder / f"{name}.tsv").write_text(lines)
        files = [f"--{which}-file={folder / name}.tsv" for which in ("train", "eval")]
        options = ["--model", str(model), "--rank", str(rank), "--out", str(folder / name)]
        assert text_lora.main([*files, *options, *SMALL, *SIZES]) == 0
        found.append(folder / name / "adapter")
    return found


def arguments(adapters) -> list[str]:
    sentences = [option for text in SENTENCES for option in ("--text", text)]
    return ["--adapter", *map(str, adapters), *sentences]


def test_a_batch_of_both_tasks_answers_as_each_alone(adapters, capsys):
    assert two_tasks.main([*arguments(adapters), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [answer["text"] for answer in results["answers"]] == list(SENTENCES)
    assert results["greatest_difference"] < 1e-5
    assert results["programs"] == 1
    for answer in results["answers"]:
        praise, length = answer["tasks"]
        assert praise["label"] in {"0", "1"}
        assert length["label"] in {"short", "medium", "long"}
        assert praise["probability"] >= 1 / 2
        assert length["probability"] >= 1 / 3
    for moved in results["adapters"]:
        assert 0 < moved["bytes"] < results["encoder"]["bytes"]


def test_answers_are_those_of_predict(adapters, capsys):
    two_tasks.main([*arguments(adapters), "--json"])
    answers = json.loads(capsys.readouterr().out)["answers"]
    for place, adapter in enumerate(adapters):
        text_lora.main(["predict", *arguments([adapter]), "--json"])
        for line, answer in zip(capsys.readouterr().out.splitlines(), answers, strict=True):
            alone = json.loads(line)
            assert alone["label"] == answer["tasks"][place]["label"]
            expected = answer["tasks"][place]["probability"]
            assert alone["probability"] == pytest.approx(expected, rel=1e-4)


def test_tables_are_for_people(adapters, capsys):
    assert two_tasks.main(arguments(adapters)) == 0
    output = capsys.readouterr().out
    assert "3 sentences × 2 tasks" in output
    assert "the encoder, once" in output


def test_a_folder_without_an_adapter_is_an_error(adapters, tmp_path, capsys):
    assert two_tasks.main(arguments([adapters[0], tmp_path])) == 2
    assert "is not the folder of an adapter" in capsys.readouterr().err


def test_adapters_of_other_weights_are_an_error(adapters, tmp_path, capsys):
    folder = adapters[0].parent
    files = [f"--{which}-file={folder}.tsv" for which in ("train", "eval")]
    options = ["--model", str(folder.parent / "model"), "--out", str(tmp_path), "--targets", "key"]
    assert text_lora.main([*files, *options, *SMALL, *SIZES]) == 0
    assert two_tasks.main(arguments([adapters[0], tmp_path / "adapter"])) == 2
    assert "error: " in capsys.readouterr().err
