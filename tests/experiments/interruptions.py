"""Trainings that are interrupted within a step."""

from typing import Any

import pytest


def interrupted_after(training: type, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the next training of this kind raise KeyboardInterrupt when so many steps are done."""
    take_step = training._take_step

    def interrupting(self: Any, batch: Any) -> None:
        if self.step == steps:
            self.history.add_step({"loss": 0.0})  # a trace of the step that is not finished
            raise KeyboardInterrupt
        take_step(self, batch)

    monkeypatch.setattr(training, "_take_step", interrupting)
