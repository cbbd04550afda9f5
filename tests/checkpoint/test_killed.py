"""A run that is killed at any moment ends with the numbers of one that is not, bit for bit."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.killed_run import SAVE_EVERY, STEPS

ROOT = Path(__file__).parents[2]


def numbers(file):
    """Returns each leaf of the adapters, the optimiser's state and the losses."""
    with np.load(file) as arrays:
        return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


KILLS = {"asynchronous": 12, "synchronous": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def reports(folder):
    """Returns what became of each attempt, in each mode: one process imports JAX for all."""
    kills = [f"{mode}={count}" for mode, count in KILLS.items()]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.checkpoint.killed_run", str(folder), *kills],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kills"), KILLS.items())
def test_a_killed_run_ends_with_the_same_numbers(folder, reports, mode, kills):
    folder, report = folder / mode, reports[mode]
    assert [attempt["code"] for attempt in report["attempts"]] == [-signal.SIGKILL] * kills
    assert report["codes"] == [0, 0, 0]
    # The premise: many were in the middle of a save, and the run did get on.
    left = [attempt["left"] for attempt in report["attempts"]]
    assert sum(any("tmp" in name for name in names) for names in left) >= kills // 4
    latest = [max((int(x) for x in names if re.fullmatch(r"\d+", x)), default=0) for names in left]
    assert latest == sorted(latest)
    assert len(set(latest)) >= kills // 3
    # What the kills left is gone; the latest two are there, and the best.
    steps = {int(path.name) for path in (folder / "checkpoints").iterdir()}
    assert steps >= {STEPS - SAVE_EVERY, STEPS}
    assert len(steps) <= 3
    whole = numbers(folder / "whole.npz")
    assert len(whole) == 19  # adapters 5, Adam 12, the key and the losses
    assert numbers(folder / "killed.npz") == whole
    assert numbers(folder / "resumed.npz") == whole
