"""Objects in other processes: what comes back, and what is told when something breaks."""

import contextlib
import os

import pytest

from benchmarks.peers.processes import Remote
from experiments.common.errors import InputError

SQUARES = "tests.benchmarks.squares:Squares"


@pytest.fixture(scope="module")
def remote():
    with contextlib.closing(Remote(SQUARES, threads=1, arguments={"offset": 3})) as remote:
        yield remote


def test_methods_are_called_there(remote):
    assert remote.call("squared", number=4) == 19
    assert remote.call("process") != os.getpid()
    assert remote.seconds_to_start > 0


def test_it_has_the_cores_that_it_was_given(remote):
    assert remote.call("cores") == 1


def test_what_it_prints_is_no_reply(remote):
    assert remote.call("squared_aloud", number=2) == 7


def test_memory_counts_for_that_process_alone(remote):
    before = remote.peak_bytes
    assert remote.call("filled", megabytes=200) == 200
    assert remote.peak_bytes - before > 150e6
    assert remote.forget_peak() - before > 150e6
    assert remote.peak_bytes - before < 100e6


def test_an_error_there_is_an_error_here(remote):
    with pytest.raises(RuntimeError, match="squares:Squares: ValueError: 'four' is not a number"):
        remote.call("squared", number="four")
    assert remote.call("squared", number=1) == 4


def test_what_the_caller_has_to_change_is_said_without_a_trace(remote, capfd):
    with pytest.raises(InputError, match="^there is no file of squares$"):
        remote.call("read")
    assert "Traceback" not in capfd.readouterr().err
    assert remote.call("squared", number=1) == 4


def test_a_class_that_can_not_be_made_is_an_error():
    with pytest.raises(RuntimeError, match="TypeError"):
        Remote(SQUARES, threads=1, arguments={"unknown": 3})


def test_a_process_that_ends_is_an_error():
    with (
        contextlib.closing(Remote(SQUARES, threads=1, arguments={"offset": 0})) as remote,
        pytest.raises(RuntimeError, match="its process ended with 7"),
    ):
        remote.call("leave", code=7)
