"""One side of a comparison of trainings, what was seen of it, and how sides take turns."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.processes import Remote
from experiments.common.console import Console
from experiments.common.timing import in_turns

OURS, PEFT = "lora_jax", "PEFT"
GREATEST_LOSS_DIFFERENCE = 1e-3


@dataclass
class Contender:
    """A remote training, and its numbers.

    Attributes:
      remote: the object in its process.
      losses: for each training, those of its steps.
      rates: how much of each block of steps was done in a second.
      seconds_to_ready: until it had compiled, or tried, batches of every length.
      bytes_to_ready: the most memory of its process until then.
      peak_bytes: the most memory of its process in the first training after that.
      versions: of what computes.
    """

    remote: Remote
    losses: list[list[float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    seconds_to_ready: float = 0.0
    bytes_to_ready: int = 0
    peak_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def begin(self, **arguments: Any) -> None:
        """Starts a training; the first time, also gets ready for batches of every length."""
        start = time.perf_counter()
        self.remote.call("begin", **arguments)
        if not self.losses:
            self.remote.call("warm_up")
            self.seconds_to_ready = self.remote.seconds_to_start + time.perf_counter() - start
            self.bytes_to_ready = self.remote.forget_peak()
            self.versions = self.remote.call("versions")
        self.losses.append([])

    def take(self, first: int, sizes: Sequence[float]) -> None:
        """Takes steps of these sizes, from the number `first` on, and notes how fast they were."""
        found = self.remote.call("steps", first=first, count=len(sizes))
        self.losses[-1] += found["losses"]
        self.rates.append(sum(sizes) / found["seconds"])
        if len(self.losses) == 1:
            self.peak_bytes = self.remote.peak_bytes

    @property
    def rate(self) -> float:
        """The median over blocks."""
        return float(np.median(self.rates))

    def results(self) -> dict[str, Any]:
        """Returns all of it, fit for JSON."""
        return {
            "seconds_to_ready": self.seconds_to_ready,
            "bytes_to_ready": self.bytes_to_ready,
            "peak_bytes": self.peak_bytes,
            "rates": self.rates,
            "losses": self.losses,
            "versions": self.versions,
        }


def take_turns(
    contenders: Mapping[str, Contender],
    sizes: Sequence[float],
    *,
    block: int,
    description: str,
    console: Console,
) -> None:
    """Lets all contenders take the same steps, a block each.

    Args:
      contenders: those that have begun.
      sizes: how much each step counts in a rate: 1, or its tokens.
      block: the steps of a block.
      description: what is shown beside the progress.
      console: where it is shown.
    """
    firsts = range(0, len(sizes), block)
    with console.progress(description, len(firsts)) as progress:
        for first, order in zip(firsts, in_turns(list(contenders), len(firsts)), strict=True):
            for name in order:
                contenders[name].take(first, sizes[first : first + block])
            progress.advance()


def faster(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Returns how much we do while they do 1: the median over rates that were measured in turns."""
    return float(np.median(np.divide(ours, theirs)))


def loss_differences(ours: Contender, theirs: Contender) -> NDArray[np.float64]:
    """Returns how far their losses in the first training are from ours, relative to ours."""
    return np.abs(np.divide(theirs.losses[0], ours.losses[0]) - 1)


def check_losses(greatest: float, bound: float = GREATEST_LOSS_DIFFERENCE) -> None:
    """Raises a `RuntimeError` unless losses that differ by this much are the same computation's."""
    if not greatest < bound:
        raise RuntimeError(f"the losses differ by {greatest:.1e}, expected less than {bound}")


def versions(contenders: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the versions of everything that computed, from the results of all."""
    return {name: each for one in contenders for name, each in one["versions"].items()}
