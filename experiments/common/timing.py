"""How long computations take, and how to compare them fairly: in turns, in one process."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from experiments.common.console import Console

_WARM_UP_ROUNDS = 5


def timed(computation: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds that a computation takes, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(computation())
    return time.perf_counter() - start, result


def milliseconds(
    computations: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    console: Console,
    description: str = "Timing",
) -> dict[str, float]:
    """Returns the median time of each computation; see `rounds_of_milliseconds`."""
    times = rounds_of_milliseconds(computations, rounds, console=console, description=description)
    return {name: float(np.median(found)) for name, found in times.items()}


def rounds_of_milliseconds(
    computations: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    console: Console,
    description: str,
) -> dict[str, NDArray[np.float64]]:
    """Returns each computation's time in each round, after some rounds to warm up.

    The computations take turns; see `in_turns`.
    """
    names = list(computations)
    times: dict[str, list[float]] = {name: [] for name in names}
    with console.progress(description, rounds + _WARM_UP_ROUNDS) as progress:
        for order in in_turns(names, rounds + _WARM_UP_ROUNDS):
            for name in order:
                start = time.perf_counter()
                jax.block_until_ready(computations[name]())
                times[name].append(1000 * (time.perf_counter() - start))
            progress.advance()
    return {name: np.array(times[name][_WARM_UP_ROUNDS:]) for name in names}


def in_turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Yields, for each round, the names in the order of their turns.

    Each round starts with a different name, so that neither a machine that slows down nor a cache
    that one computation leaves for the next favours any of them.
    """
    for number in range(rounds):
        first = number % len(names)
        yield [*names[first:], *names[:first]]


class Stopwatch:
    """Collects the seconds of each phase of a study."""

    def __init__(self) -> None:
        self._start = self._phase_start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def phase_ended(self, name: str) -> None:
        """Adds the time since the last phase ended to the seconds of `name`."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._phase_start
        self._phase_start = now

    def seconds(self) -> dict[str, float]:
        return {**self._seconds, "total": time.perf_counter() - self._start}
