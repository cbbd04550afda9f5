"""Which checkpoints of a run are kept, and which is the best."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Mode = Literal["min", "max"]


class Retention:
    """Orbax's preservation policy of the latest steps and of the best one.

    Attributes:
      metrics: those of each step.
    """

    def __init__(self, keep: int | None, best: str | None, mode: Mode) -> None:
        self.metrics: dict[int, Mapping[str, float]] = {}
        self._keep = keep
        self._best = best
        self._sign = 1 if mode == "min" else -1

    def best(self, steps: Sequence[int]) -> int | None:
        """Returns the best of `steps`, the later of two that are alike."""
        return min(steps, key=lambda step: (self._loss(step), -step), default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether it is kept, as Orbax asks before it deletes."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps if self._keep is None else steps[-self._keep :])
        if self._best is not None:
            kept.add(self.best(steps))
        return [step in kept for step in steps]

    def _loss(self, step: int) -> float:
        """Returns what the best step has least of; what is not a number is never best."""
        value = self.metrics.get(step, {}).get(self._best or "", math.nan)
        return math.inf if math.isnan(value) else self._sign * value
