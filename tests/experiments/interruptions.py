"""Trainings that are interrupted within a step."""

import signal
from typing import Any

import pytest


def interrupted_after(training: type, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Ctrl-C pressed in the last of so many steps of a training of this kind."""
    taken = training.taken

    def interrupting(self: Any, batch: Any) -> Any:
        if self.step == steps - 1:
            signal.raise_signal(signal.SIGINT)
        return taken(self, batch)

    monkeypatch.setattr(training, "taken", interrupting)
