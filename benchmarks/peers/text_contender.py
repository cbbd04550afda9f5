"""One side of the comparison on text, and what was seen of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.contender import Contender


@dataclass
class TextContender(Contender):
    """A remote `LoraJax` or `Peft`, and its numbers.

    Attributes:
      accuracies: for each seed, that on the test sentences.
    """

    accuracies: list[float] = field(default_factory=list)

    def finish(self, folder: Path) -> None:
        """Ends a training: the adapter and what it says of the test sentences go to `folder`."""
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
            "steps_per_second": self.rate,
            "accuracies": self.accuracies,
            **super().results(),
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
