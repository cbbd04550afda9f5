"""A side that writes with an adapter, and what was seen of it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.processes import Remote


@dataclass
class Writing:
    """A remote `LoraJaxWriter` or `PeftWriter`, and its numbers.

    Attributes:
      remote: the object in its process.
      tokens: what it has written after each prompt.
      rates: the tokens per second of each time but the first, for which all is compiled.
      peak_bytes: the most memory of its process while it wrote.
    """

    remote: Remote
    tokens: list[list[int]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def begin(self) -> None:
        """Writes once, without being timed."""
        self.tokens = self.remote.call("write")["tokens"]
        self.remote.forget_peak()

    def take(self) -> None:
        """Writes the same again, and notes how fast it was."""
        found = self.remote.call("write")
        if found["tokens"] != self.tokens:
            raise RuntimeError("the same prompts were answered in two ways, without chance")
        self.rates.append(self.count / found["seconds"])
        self.peak_bytes = self.remote.peak_bytes

    @property
    def count(self) -> int:
        """How many tokens it has written each time."""
        return sum(map(len, self.tokens))

    @property
    def rate(self) -> float:
        """The median."""
        return float(np.median(self.rates))

    def same_as(self, other: "Writing") -> int:
        """Returns how many tokens both write before the first difference of each answer."""
        differ: NDArray[np.bool_] = np.array(self.tokens) != np.array(other.tokens)
        return int((~np.logical_or.accumulate(differ, axis=1)).sum())

    def results(self) -> dict[str, Any]:
        """Returns all of it, fit for JSON."""
        return {
            "tokens_per_second": self.rate,
            "peak_bytes": self.peak_bytes,
            "rates": self.rates,
            "tokens": self.tokens,
        }
