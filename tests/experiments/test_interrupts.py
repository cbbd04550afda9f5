"""A Ctrl-C that Python loses stops a study at its next step, and no other study."""

import contextlib
import signal

import pytest

from experiments.command import exit_code
from experiments.interrupts import raise_if_interrupted


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


def test_a_job_that_ignores_interrupts_goes_on_doing_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def study():
        signal.raise_signal(signal.SIGINT)
        raise_if_interrupted()

    assert exit_code(study) == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
