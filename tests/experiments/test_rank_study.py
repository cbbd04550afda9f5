"""The study of ranks: its grid, what it reuses and what it refuses, and how it goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.common.stores import CellStore
from experiments.rank_study import main
from experiments.ranks.cells import FineTuning, StepTimes, cells_of
from experiments.ranks.methods import METHODS, optimizer
from experiments.ranks.options import parsed
from tests.experiments import small_rank_study
from tests.experiments.small_rank_study import HIDDEN

DIGITS = ("--data", "digits", "--batch-size", "50", "--finetune-batches", "2", "--no-plots")
GRID = ("--ranks", "1", "12", "--methods", "lora", "lora_plus", "--repeats", "2")
# The inputs and outputs of the hidden layers, and those of the output layer.
SIDES = (784 + HIDDEN[0] + HIDDEN[0] + HIDDEN[1], HIDDEN[1] + 10)
# A fine-tuning for each rank, method and repetition, and the step times of each rank.
GRID_CELLS = 2 * 2 * 2 + 2


@pytest.fixture(autouse=True, scope="module")
def small_network():
    with pytest.MonkeyPatch.context() as patched:
        small_rank_study.patch(patched)
        yield


@pytest.fixture(scope="module")
def base(small_network, tmp_path_factory) -> Path:
    """Returns the base network of a run that trained it, and tried every method once."""
    out = tmp_path_factory.mktemp("first") / "out"
    assert run(out, "--ranks", "2", "--repeats", "1", "--base", out / "none") == 0
    return out / "base_checkpoint"


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    """Returns the folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(out, *GRID, "--base", base) == 0
    return out


def run(out, *arguments) -> int:
    return main([*DIGITS, "--out", str(out), *map(str, arguments)])


def metrics_in(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def cells_in(out: Path) -> list[Path]:
    # Hidden files are those that are being written.
    return sorted((out / "cells").glob("[!.]*.json"))


def numbers_of(metrics: dict) -> dict:
    """Returns the metrics without what the clock says."""
    times = ("milliseconds", "relative_time")
    cells = [{key: cell[key] for key in cell if key not in times} for cell in metrics["cells"]]
    return {**{key: metrics[key] for key in metrics if key != "seconds"}, "cells": cells}


@pytest.fixture
def computed(monkeypatch) -> list:
    """Returns the list of cells that are computed from now on."""
    found = []
    for kind in (FineTuning, StepTimes):

        def result(cell, task, original=kind.result):
            found.append(cell)
            return original(cell, task)

        monkeypatch.setattr(kind, "result", result)
    return found


def test_every_method_gives_all_its_numbers(base):
    metrics = metrics_in(base.parent)
    assert [cell["method"] for cell in metrics["cells"]] == list(METHODS)
    assert metrics["base"]["wrong_counts"][metrics["digit"]] == max(metrics["base"]["wrong_counts"])
    for cell in metrics["cells"]:
        assert cell["rank"] == 2
        assert len(cell["wrong"]) == len(cell["accuracy"]) == 1
        assert 0 <= cell["wrong"][0] <= metrics["test_images_of_digit"]
        assert 0 < cell["accuracy"][0] <= 1
        assert cell["milliseconds"] > 0
        assert cell["relative_time"] > 0
    by_method = {cell["method"]: cell for cell in metrics["cells"]}
    assert by_method["lora"]["trainable"] == 2 * sum(SIDES)
    assert by_method["dora"]["trainable"] == by_method["lora"]["trainable"] + sum(HIDDEN) + 10


def test_the_grid_is_complete_and_the_output_layer_has_no_more_rank_than_columns(whole):
    metrics = metrics_in(whole)
    assert [(cell["rank"], cell["method"]) for cell in metrics["cells"]] == [
        (1, "lora"),
        (1, "lora_plus"),
        (12, "lora"),
        (12, "lora_plus"),
    ]
    at_twelve = metrics["cells"][2]
    assert at_twelve["trainable"] == 12 * SIDES[0] + 10 * SIDES[1]
    assert all(len(cell["accuracy"]) == 2 for cell in metrics["cells"])
    assert len(cells_in(whole)) == GRID_CELLS


def test_the_base_of_another_run_is_used_where_settings_agree(base, tmp_path, capsys):
    small = ("--ranks", "1", "--methods", "lora", "--repeats", "1", "--base", base)
    assert run(tmp_path / "same", *small) == 0
    assert f"reused from {base}" in capsys.readouterr().out
    assert not (tmp_path / "same" / "base_checkpoint").exists()
    assert run(tmp_path / "other", *small, "--seed", "1") == 0
    assert "Base network: reused" not in capsys.readouterr().out
    assert (tmp_path / "other" / "base_checkpoint").is_dir()


def test_a_second_run_computes_nothing_and_says_so(whole, base, computed, capsys):
    before = metrics_in(whole)
    assert run(whole, *GRID, "--base", base) == 0
    assert computed == []
    assert f"{GRID_CELLS} of {GRID_CELLS} reused" in capsys.readouterr().out
    again = metrics_in(whole)
    del before["seconds"], again["seconds"]
    assert again == before


def test_an_interruption_loses_no_finished_cell(
    whole, base, computed, tmp_path, monkeypatch, capsys
):
    """One run after another is interrupted, each in the cell after the one that it finished."""
    out = tmp_path / "out"
    store_save = CellStore.save
    reached = []

    def save(store, settings, result):
        reached.append(result)
        if len(reached) > 1 or finished == 0:
            raise KeyboardInterrupt
        store_save(store, settings, result)

    monkeypatch.setattr(CellStore, "save", save)
    for finished in range(GRID_CELLS):
        computed.clear()
        reached.clear()
        assert run(out, *GRID, "--base", base) == 130
        assert capsys.readouterr().err == "error: interrupted; what was finished is kept\n"
        assert len(computed) == (1 if finished == 0 else 2)
        assert len(cells_in(out)) == finished
        assert not (out / "metrics.json").exists()
    computed.clear()
    monkeypatch.setattr(CellStore, "save", store_save)
    assert run(out, *GRID, "--base", base) == 0
    assert len(computed) == 1
    assert numbers_of(metrics_in(out)) == numbers_of(metrics_in(whole))


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(whole, base, computed, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.experiments.small_rank_study", *DIGITS, *GRID]
    with subprocess.Popen(
        [*command, "--base", str(base), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        # As the tests themselves run, to the last bit.
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"},
    ) as process:
        while len(cells_in(out)) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finished = len(cells_in(out))
    assert 2 <= finished < GRID_CELLS
    assert run(out, *GRID, "--base", base) == 0
    fine_tunings = [cell for cell in computed if isinstance(cell, FineTuning)]
    assert len(fine_tunings) <= 8 - 2
    assert numbers_of(metrics_in(out)) == numbers_of(metrics_in(whole))


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        (["--alpha", "2"], 8),
        (["--lora-plus-ratio", "8"], 4),
        (["--replay", "0.25"], 8),
        (["--digit", "0"], 8),
        (["--learning-rate", "0.01"], GRID_CELLS),
        (["--repeats", "3"], 4),
        (["--ranks", "1", "2"], 5),
        (["--methods", "lora", "rslora"], 4 + 2),
        (["--fresh"], GRID_CELLS),
    ],
)
def test_only_cells_of_the_same_settings_are_reused(
    changed, again, whole, base, computed, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    assert run(out, *GRID, "--base", base, *changed) == 0
    assert len(computed) == again
    computed.clear()
    assert run(out, *GRID, "--base", base) == 0
    assert computed == []


@pytest.mark.slow
def test_from_the_shell_standard_output_is_json_alone_and_the_picture_is_drawn(tmp_path):
    """The one run of the command itself, on the true network."""
    out = tmp_path / "out"
    command = [sys.executable, "-W", "error", "-m", "experiments.rank_study", *DIGITS[:-1]]
    options = ["--ranks", "1", "--methods", "lora", "--repeats", "1", "--json"]
    options += ["--batch-size", "20"]  # the times are those of hundreds of steps
    places = ["--base", str(out / "none"), "--out", str(out)]
    done = subprocess.run(
        [*command, *options, *places], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert metrics == metrics_in(out)
    assert metrics["cells"][0]["trainable"] == 784 + 1000 + 1000 + 2000 + 2000 + 10
    assert done.stderr.startswith("JAX ")
    assert "Wrong answers on digit" in done.stderr
    assert "\x1b" not in done.stderr
    names = {path.name for path in out.iterdir()}
    assert names == {"metrics.json", "rank_study.png", "cells", "base_checkpoint"}


def test_a_damaged_cell_is_told_and_computed_again(whole, base, computed, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    cells_in(out)[0].write_text('{"settings"')
    assert run(out, *GRID, "--base", base) == 0
    assert "can't be read" in capsys.readouterr().out
    assert len(computed) == 1
    assert numbers_of(metrics_in(out)) == numbers_of(metrics_in(whole))


def test_the_methods_differ_in_scale_and_in_the_learning_rate_of_lora_b():
    assert optimizer(1e-3, None) is optimizer(1e-3, None)
    assert optimizer(1e-3, None) is not optimizer(1e-3, 16.0)
    assert METHODS["rslora"].settings == {"rslora": True}
    assert [name for name, method in METHODS.items() if method.faster_B] == ["lora_plus"]


def test_the_grid_has_each_rank_once_in_order_and_times_all_methods_together():
    options = parsed(["--ranks", "4", "2", "4", "--methods", "dora", "lora", "--repeats", "1"])
    assert cells_of(options.grid) == [
        FineTuning(2, "lora", 0),
        FineTuning(2, "dora", 0),
        StepTimes(2, ("lora", "dora")),
        FineTuning(4, "lora", 0),
        FineTuning(4, "dora", 0),
        StepTimes(4, ("lora", "dora")),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "argument --ranks"),
        (["--ranks", "1.5"], "argument --ranks"),
        (["--ranks"], "argument --ranks"),
        (["--ranks", "1", "785"], "hidden_1/kernel"),
        (["--methods", "qlora"], "argument --methods"),
        (["--repeats", "0"], "argument --repeats"),
        (["--alpha", "0"], "argument --alpha"),
        (["--lora-plus-ratio", "nan"], "argument --lora-plus-ratio"),
        (["--replay", "1.5"], "argument --replay"),
        (["--seed", "-1"], "argument --seed"),
        (["--batch-size", "5000"], "--batch-size 5000"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments, message, tmp_path, monkeypatch, error_of):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(main, ["--data", "digits", "--out", "out", *arguments])
    assert not list(tmp_path.glob("out/*"))


def test_a_failure_is_one_line_and_exit_code_1(base, tmp_path, monkeypatch, capsys):
    def full(store, settings, result):
        raise OSError("disk full")

    monkeypatch.setattr(CellStore, "save", full)
    small = ("--ranks", "1", "--methods", "lora", "--repeats", "1", "--base", base)
    assert run(tmp_path / "out", *small) == 1
    assert capsys.readouterr().err == "error: OSError: disk full\n"


def test_help_explains_every_option_and_method(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for text in ("--ranks", "--alpha", "--replay", "--fresh", "--base", "examples:", *METHODS):
        assert text in shown
    assert "default: 1 2 4 8 16 32" in shown
