"""What the transform reports: a record of each use, and the warning."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal

from lora_jax._compat import Equation, callers_level, source_line
from lora_jax._shapes import Size

OnMaterialize = Literal["warn", "error", "ignore"]
How = Literal["factored", "merged", "dense", "materialized"]


class MaterializationWarning(UserWarning):
    """`adapt` built W + scale · lora_A · lora_B for an op that no rule covers."""


class MaterializationError(ValueError):
    """The same as `MaterializationWarning` under `adapt(fn, on_materialize="error")`."""


@dataclasses.dataclass(frozen=True)
class Use:
    """One equation that an adapted weight reached, and how it was computed.

    Attributes:
      path: the weight's path in the arguments.
      primitive: the name of the JAX primitive; `"norm"` for the norm of a DoRA weight.
      source: the line of the model's own source.
      how: `"factored"`; `"merged"` where building W + AB, with the gradients of the factors, takes
        fewer FLOPs in a training step; `"dense"` where building it and its own gradient does;
        `"materialized"` where no rule covers the primitive.
      base_flops: FLOPs of the base op alone.
      factored_flops: FLOPs that products with the factors add in one forward pass; None where no
        rule covers the op.
      dense_flops: FLOPs that building W + AB adds.
      times: how often this happens in one call.
    """

    path: str
    primitive: str
    source: str
    how: How
    base_flops: Size
    factored_flops: Size | None
    dense_flops: Size
    times: Size = 1

    @property
    def added_flops(self) -> Size:
        """FLOPs that the adapter adds to one forward pass in the way that it is computed."""
        if self.how == "factored" and self.factored_flops is not None:
            return self.factored_flops
        return self.dense_flops

    @property
    def reason(self) -> str:
        """Why it is computed in this way."""
        return {
            "factored": "a rule covers it",
            "merged": "building W + AB for each direction makes a training step cheaper",
            "dense": "building W + AB and its gradient makes a training step cheaper",
            "materialized": "no rule covers it",
        }[self.how]


# Called with each use: a `Use`, or what another interpretation records instead.
Recorder = Callable[[Any], None]


def ignore(use: Any) -> None:
    """Ignores a use."""
    del use


@dataclasses.dataclass(frozen=True)
class Reporter:
    """Passes to a recorder what happens at the equations of one body.

    Attributes:
      recorder: the recorder.
      callers: the equations whose bodies are being evaluated, the innermost last.
      times: how often the body runs in one call, if known.
    """

    recorder: Recorder = ignore
    callers: tuple[Equation, ...] = ()
    times: Size = 1

    def within(self, equation: Equation, times: Size = 1) -> "Reporter":
        """Returns the reporter for a body of an equation, which runs `times` times."""
        return dataclasses.replace(
            self, callers=(*self.callers, equation), times=self.times * times
        )

    def source_of(self, equation: Equation) -> str:
        """Returns the model's own line for an equation, or that of the call around it."""
        lines = (source_line(each) for each in (equation, *reversed(self.callers)))
        return next((line for line in lines if line is not None), "an unknown line")

    def tell(self, use: Use) -> None:
        """Records a use, which happens as often as the body runs."""
        self.recorder(dataclasses.replace(use, times=self.times * use.times))


def recorder_for(on_materialize: OnMaterialize) -> Recorder:
    """Returns a recorder that warns or raises where W + AB is built."""
    return {"warn": _warning_once(), "error": _refuse, "ignore": ignore}[on_materialize]


def _warning_once() -> Recorder:
    """Returns a recorder that warns of each place once, however often it is traced."""
    told: set[str] = set()

    def warn(use: Any) -> None:
        message = _message(use)
        if use.how == "materialized" and message not in told:
            warnings.warn(message, MaterializationWarning, stacklevel=callers_level())
            told.add(message)

    return warn


def _refuse(use: Any) -> None:
    if use.how == "materialized":
        raise MaterializationError(
            f"{_message(use)} Leave this weight out of `targets`, or allow it with "
            "adapt(fn, on_materialize='warn')."
        )


def _message(use: Use) -> str:
    return (
        f"'{use.path}' reaches `{use.primitive}` at {use.source}, for which there is no rule: "
        "W + scale · lora_A · lora_B is built there, which is correct but costs the memory of a "
        "whole weight."
    )
