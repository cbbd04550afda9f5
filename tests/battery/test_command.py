"""`python -m tests.battery`."""

import subprocess
import sys
from pathlib import Path

from tests.battery.__main__ import main

ROOT = Path(__file__).parent.parent.parent


def test_lists_the_rows_that_an_expression_matches(capsys):
    assert (
        main(["--list", "--all", "--only", r"structure.transposed \| in,out \| lora \| array"]) == 0
    )
    names = capsys.readouterr().out.splitlines()
    assert len(names) == 8
    assert all(name.startswith("structure.transposed | in,out | lora | array | ") for name in names)


def test_says_when_nothing_matches(capsys):
    assert main(["--only", "no such op"]) == 2
    assert "'no such op'" in capsys.readouterr().err


def test_runs_rows_in_processes_of_its_own():
    row = r"structure.transposed \| in,out \| lora \| array \| (jit|jvp)$"
    done = subprocess.run(
        [sys.executable, "-m", "tests.battery", "--all", "--only", row, "--processes", "2"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 rows, 0 failures")
