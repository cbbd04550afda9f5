"""What is stored of the study on images, and what the documentation says of it."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import images
from benchmarks.stored import ResultStore

DOCS = Path(__file__).parents[2] / "docs"
METRICS = {
    "base": {"held_out": [7, 4]},
    "base_parameters": 1_000_000,
    "classifier_accuracy": 0.987,
    "recognised": {
        "the base": {str(digit): 0.0 if digit in (7, 4) else 0.9 for digit in range(10)},
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
    recognised, costs = images.tables(METRICS)
    assert recognised.header == ["", "7, held out", "4, held out", "the others"]
    assert recognised.rows[0] == ["the base", "0%", "0%", "90%"]
    assert costs.rows[0] == ["7, LoRA", "1,234", "61", "100 MB", "5.0 MB"]
    assert costs.rows[1] == ["7, full fine-tuning", "1,000,000", "70", "200 MB", "4.0 MB"]


def test_a_run_is_stored_with_its_command(tmp_path, monkeypatch, capsys):
    def run(command, check):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "metrics.json").write_text(json.dumps(METRICS))
        return subprocess.CompletedProcess(command, 3 if "--rank" in command else 0)

    monkeypatch.setattr(images.subprocess, "run", run)
    folders = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    assert images.main([*folders, "--markdown", "--", "--seed", "1"]) == 0
    assert "| 7, LoRA | 1,234 | 61 | 100 MB | 5.0 MB |" in capsys.readouterr().out
    stored = ResultStore(tmp_path / "results").load(images.NAME)
    (command,) = stored["commands"]
    assert command.startswith("python -m experiments.image_lora --seed 1 --out ")
    assert images.main([*folders, "--", "--rank", "1"]) == 1
    assert "ended with 3" in capsys.readouterr().err


def test_the_tables_of_the_documentation_are_those_of_the_stored_result():
    found = ResultStore(images.RESULTS / "images").load(images.NAME)
    if found is None:
        pytest.skip("nothing has been stored")
    text = re.sub(r"\n{2,}", "\n", (DOCS / "images.md").read_text())
    for table in images.tables(found):
        assert table.as_markdown() in text, table.title
