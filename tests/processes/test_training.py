"""Runs of several processes: they train, one is killed, and others go on where they stopped."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.agreement import assert_agree

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS, DIES_AT = 6, 5


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run(folder: Path, processes: int, **options: Any) -> list[int]:
    """Runs all processes of a program, and returns their exit codes as a supervisor sees them."""
    port = free_port()
    told = {"processes": processes, "port": port, "folder": str(folder), "steps": STEPS, **options}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.processes.worker", json.dumps({**told, "process": i})],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for i in range(processes)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    codes = [process.returncode for process in started]
    if any(codes) and "dies_at" not in options:
        raise AssertionError("\n".join(errors))
    return codes


def results(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "results.npz") as found:
        return dict(found)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert run(folder, 1) == [0]
    return results(folder)


@pytest.mark.parametrize(
    ("first", "then", "dies", "explicit"),
    [(2, 4, "writing", False), (2, 1, "committing", True)],
)
def test_a_run_that_is_killed_while_it_saves_goes_on_with_other_processes(
    first: int, then: int, dies: str, explicit: bool, unbroken: Any, tmp_path: Path
) -> None:
    codes = run(tmp_path, first, dies_at=DIES_AT, dies=dies, explicit=explicit)
    # No process hangs, and none says that all went well.
    assert codes[0 if dies == "committing" else -1] == 9
    assert all(codes)
    assert not (tmp_path / "results.npz").exists()
    assert run(tmp_path, then, explicit=explicit) == [0] * then
    found = results(tmp_path)
    assert found.pop("start") == DIES_AT - 1
    expected = {name: array for name, array in unbroken.items() if name != "start"}
    assert_agree(found, expected, tolerance=1e-5)
