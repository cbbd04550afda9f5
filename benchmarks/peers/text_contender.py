"""One side of the comparison on text, and what was seen of it."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.processes import Remote


@dataclass
class Contender:
    """A remote `LoraJax` or `Peft`, and its numbers.

    Attributes:
      remote: the object in its process.
      losses: for each seed, those of its steps.
      rates: the steps per second of each block of steps.
      accuracies: for each seed, that on the test sentences.
      seconds_to_ready: until it had compiled, or tried, batches of every length.
      peak_bytes: the most memory of its process while it trained with the first seed.
      versions: of what computes.
    """

    remote: Remote
    losses: list[list[float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds_to_ready: float = 0.0
    peak_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def begin(self, seed: int) -> None:
        """Starts a training; the first time, also gets ready for batches of every length."""
        start = time.perf_counter()
        self.remote.call("begin", seed=seed)
        if not self.losses:
            self.remote.call("warm_up")
            self.seconds_to_ready = self.remote.seconds_to_start + time.perf_counter() - start
            self.versions = self.remote.call("versions")
        self.losses.append([])

    def take(self, first: int, count: int) -> None:
        """Takes these steps of the training, and notes how fast they were."""
        found = self.remote.call("steps", first=first, count=count)
        self.losses[-1] += found["losses"]
        self.rates.append(count / found["seconds"])

    def finish(self, folder: Path) -> None:
        """Ends a training: the adapter and what it says of the test sentences go to `folder`."""
        if not self.accuracies:
            self.peak_bytes = self.remote.peak_bytes
        self.remote.call("save", folder=str(_adapter(folder)))
        self.accuracies.append(self.remote.call("test", path=str(_predictions(folder))))

    def exchange(self, folder: Path) -> "Exchange":
        """Returns how this side's predictions with the adapter in `folder` are like its maker's."""
        self.remote.call("load", folder=str(_adapter(folder)))
        mine = folder / "exchanged.npy"
        self.remote.call("test", path=str(mine))
        return Exchange.of(np.load(_predictions(folder)), np.load(mine))

    def results(self) -> dict[str, Any]:
        """Returns all of it, fit for JSON."""
        return {
            "steps_per_second": float(np.median(self.rates)),
            "seconds_to_ready": self.seconds_to_ready,
            "peak_bytes": self.peak_bytes,
            "accuracies": self.accuracies,
            "rates": self.rates,
            "losses": self.losses,
            "versions": self.versions,
        }


@dataclass(frozen=True)
class Exchange:
    """What two programs say of the same sentences with the same adapter.

    Attributes:
      sentences: how many there are.
      alike: of how many both predict the same class.
      difference: the greatest between two logarithms of a probability.
    """

    sentences: int
    alike: int
    difference: float

    @classmethod
    def of(cls, first: NDArray[np.float32], second: NDArray[np.float32]) -> "Exchange":
        """Takes the logarithms of every class's probability, for each sentence."""
        alike = first.argmax(axis=-1) == second.argmax(axis=-1)
        return cls(len(first), int(alike.sum()), float(np.abs(first - second).max()))


def _adapter(folder: Path) -> Path:
    return folder / "adapter"


def _predictions(folder: Path) -> Path:
    return folder / "predictions.npy"
