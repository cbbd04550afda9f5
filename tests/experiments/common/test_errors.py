"""An error is one line, the exit code says whose fault it was, and no Ctrl-C is lost."""

import ast
import contextlib
import signal
import tomllib
from pathlib import Path

import pytest

from experiments.common.errors import (
    InputError,
    check_installed,
    exit_code,
    interrupts_held,
    needed_module,
    raise_if_interrupted,
)

ROOT = Path(__file__).parents[3]


def raising(error):
    def study():
        raise error

    return study


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("--rank is\n wrong"), 2),
        (OSError("disk full"), 1),
        (ValueError("bad"), 1),
        (RuntimeError("bad"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_line_and_have_their_exit_code(error, code, capsys):
    assert exit_code(raising(error)) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1


def test_success_is_zero_and_bugs_keep_their_traceback():
    assert exit_code(lambda: None) == 0
    with pytest.raises(AttributeError):
        exit_code(raising(AttributeError("a bug")))


def test_a_missing_package_is_named_with_what_installs_it():
    with pytest.raises(InputError, match=r"no_such_package .* pip install 'lora-jax\[text\]'"):
        check_installed("no_such_package", "lora-jax[text]")
    with pytest.raises(InputError, match=r"no_such_package .* pip install 'lora-jax\[text\]'"):
        needed_module("no_such_package", "lora-jax[text]")
    check_installed("json", "lora-jax[text]")
    assert needed_module("json", "lora-jax[text]").loads("1") == 1


def sources_that_are_named():
    """Returns what the calls in studies and benchmarks name as the source of a module."""
    for file in (*(ROOT / "experiments").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(getattr(node, "func", None), "id", None)
            if name in ("check_installed", "needed_module"):
                yield file, node.args[1]


def test_what_is_named_can_be_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = settings["project"]["optional-dependencies"]
    known = {
        *(f"lora-jax[{extra}]" for extra in extras),
        *(f"--group {group}" for group in settings["dependency-groups"]),
    }
    found = list(sources_that_are_named())
    assert len(found) > 10
    for file, source in found:
        # Another package is a constant of its module.
        assert isinstance(source, ast.Name) or source.value in known, file


@pytest.fixture(autouse=True)
def pythons_own_handler():
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


def test_a_lost_interrupt_is_raised_at_the_next_step(console, capsys):
    steps = []

    def study():
        with console.progress("Training", 3) as progress:
            for step in range(3):
                if step == 1:
                    with contextlib.suppress(KeyboardInterrupt):
                        signal.raise_signal(signal.SIGINT)
                steps.append(step)
                progress.advance()

    assert exit_code(study) == 130
    assert steps == [0, 1]
    assert "interrupted; what was finished is kept" in capsys.readouterr().err
    assert exit_code(raise_if_interrupted) == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_is_not_lost_is_raised_at_once():
    reached = []

    def study():
        signal.raise_signal(signal.SIGINT)
        reached.append("after")

    assert exit_code(study) == 130
    assert reached == []


def test_a_held_interrupt_is_raised_at_the_end_of_its_block():
    reached = []

    def study():
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached.append("within")
        reached.append("after")

    assert exit_code(study) == 130
    assert reached == ["within"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_job_that_ignores_interrupts_goes_on_doing_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def study():
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
        raise_if_interrupted()

    assert exit_code(study) == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
