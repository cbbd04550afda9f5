"""Studies that are run and stored, and the tables of what they find."""

import json
import subprocess

import pytest

from benchmarks import running
from benchmarks.stored import ResultStore
from benchmarks.studies.__main__ import main
from benchmarks.studies.tables import STUDIES

METRICS = {
    "base_parameters": 1_000_000,
    "classifier_accuracy": 0.987,
    "recognised": {
        "the base": {str(digit): 0.0 if digit == 7 else 0.8 for digit in range(10)},
        "LoRA of 7, strength 1": dict.fromkeys(map(str, range(10)), 0.8),
    },
    "costs": {
        "7": {
            "lora": {"trainable": 1_234, "seconds": 61.2, "step_bytes": 1e8},
            "full": {"trainable": 1_000_000, "seconds": 70.0, "step_bytes": 2e8},
        }
    },
    "adapter_bytes": {"7": {"diffusers": 5e6}},
}


def test_the_tables_say_what_was_found():
    recognised, costs, adapters = STUDIES["images"].tables([METRICS])
    assert recognised.header == ["", "7, held out", "the others"]
    assert recognised.rows[0] == ["the base", "0%", "80%"]
    assert costs.rows[0] == ["7, LoRA", "1,234 of 1,000,000", "61", "100.00 MB"]
    assert costs.rows[1] == ["7, in full", "1,000,000 of 1,000,000", "70", "200.00 MB"]
    assert adapters.rows == [["7", "5.00 MB"]]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Returns options that name folders, in which a study writes its numbers at once."""

    def run(command, check):
        out = tmp_path / "work" / "images"
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps({**METRICS, "model": "/a/path"}))
        return subprocess.CompletedProcess(command, 3 if (tmp_path / "fails").exists() else 0)

    monkeypatch.setattr(running.subprocess, "run", run)
    return ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]


def test_a_run_is_stored_with_its_command(folders, tmp_path, capsys):
    assert main([*folders, "images"]) == 0
    assert "7, LoRA" in capsys.readouterr().out
    stored = ResultStore(tmp_path / "results").load("images")
    assert stored["commands"] == [f"python -m experiments.image_lora --out {tmp_path}/work/images"]
    assert stored["runs"] == [METRICS]
    assert main([*folders, "--report"]) == 0
    assert "7, LoRA" in capsys.readouterr().out


def test_what_fails_is_not_stored(folders, tmp_path, capsys):
    (tmp_path / "fails").touch()
    assert main([*folders, "images"]) == 1
    assert "ended with 3" in capsys.readouterr().err
    assert main([*folders, "--report", "images"]) == 0
    assert "images is not stored yet" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_another_study_is_refused(capsys):
    assert main(["nothing"]) == 2
    assert "'nothing' is no study; one of mnist, ranks" in capsys.readouterr().err
