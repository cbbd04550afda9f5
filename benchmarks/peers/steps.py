"""Training steps, a block at a time, as every contender takes them."""

import time
from collections.abc import Callable
from typing import Any


def timed_steps(step: Callable[[int], float], first: int, count: int) -> dict[str, Any]:
    """Takes `count` steps from the number `first` on; returns their losses, and the seconds in all.

    Args:
      step: takes the step of this number, and returns its loss when it is done.
      first: the number of the first step.
      count: how many steps to take.
    """
    start = time.perf_counter()
    losses = [step(number) for number in range(first, first + count)]
    return {"seconds": time.perf_counter() - start, "losses": losses}
