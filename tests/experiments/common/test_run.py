"""A run says what computes, writes its results, prints them where asked, and checks its claims."""

import json
from pathlib import Path

import pytest

from experiments.common.claims import Claim
from experiments.common.errors import InputError
from experiments.common.run import Run
from experiments.common.shared_options import FolderOptions, OutputOptions

RESULTS = {"accuracy": 0.5}


def test_without_a_folder_results_are_printed_where_json_is_asked_for(capsys):
    Run(OutputOptions()).finish(RESULTS)
    shown = capsys.readouterr()
    assert (shown.out.startswith("JAX "), shown.out.count("\n"), shown.err) == (True, 1, "")
    Run(OutputOptions(json=True)).finish(RESULTS)
    shown = capsys.readouterr()
    assert json.loads(shown.out) == RESULTS
    assert shown.err.startswith("JAX ")


def test_a_folder_gets_the_pictures_and_the_results_with_the_seconds_of_each_phase(
    tmp_path, capsys
):
    run = Run(FolderOptions(out=tmp_path / "out", json=True))
    run.phase_ended("training")
    run.finish(RESULTS, draw=lambda folder: (folder / "picture").touch(), file="results.json")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    shown = capsys.readouterr()
    assert json.loads(shown.out) == written
    assert set(written.pop("seconds")) == {"training", "plots", "total"}
    assert written == RESULTS
    assert (tmp_path / "out" / "picture").exists()
    assert f"Results are in {tmp_path / 'out'}" in shown.err


def test_no_plots_draws_nothing(tmp_path):
    def drawn(folder: Path) -> None:
        raise AssertionError(folder)

    Run(FolderOptions(out=tmp_path, no_plots=True)).finish(RESULTS, draw=drawn)


def test_a_claim_that_does_not_hold_is_raised_when_the_results_are_written(tmp_path):
    with pytest.raises(RuntimeError, match="not as claimed: all is well"):
        Run(FolderOptions(out=tmp_path)).finish(RESULTS, claims=[Claim("all is well", False)])
    assert (tmp_path / "metrics.json").exists()


def test_a_folder_that_cannot_be_written_is_refused_at_the_beginning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out"):
        Run(FolderOptions(out=tmp_path / "file"))
