"""Computations that are compared take turns."""

import pytest

from experiments.common.timing import Stopwatch, milliseconds


def test_each_round_starts_with_another_one(console):
    calls = []
    computations = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    times = milliseconds(computations, rounds=4, console=console)
    assert set(times) == {"a", "b", "c"}
    assert all(time >= 0 for time in times.values())
    assert calls[:9] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert calls.count("a") == calls.count("b") == calls.count("c")


def test_phases_add_up_to_the_total():
    watch = Stopwatch()
    for phase in ("one", "two", "one"):
        watch.phase_ended(phase)
    seconds = watch.seconds()
    assert list(seconds) == ["one", "two", "total"]
    assert seconds["one"] + seconds["two"] == pytest.approx(seconds["total"], abs=0.1)
