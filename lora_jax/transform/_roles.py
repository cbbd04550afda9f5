"""Which role each axis of a weight plays: what `infer_axes` records as probes pass through a model.

A weight is traced as a factored value with one probe for each of its axes: a term whose first
factor holds that axis alone. The rules move the probes along with the weight, and at a contraction
each probe shows where its axis has gone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax._compat import Equation
from lora_jax._shapes import Axes, AxisRole
from lora_jax.transform._factored import Factored
from lora_jax.transform._interpreter import Evaluation, Interpreter
from lora_jax.transform._terms import Factor, Term


@dataclasses.dataclass(frozen=True)
class Probe:
    """The origin of a probing term: one axis of a weight."""

    path: str
    axis: int
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.path


@dataclasses.dataclass(frozen=True)
class RolesNote:
    """The roles that a weight's axes play at one equation.

    Attributes:
      path: the weight.
      primitive: the name of the primitive.
      source: the model's own line.
      axes: the role of each axis of the weight, or None if it is not a matrix there.
      equations: the equation, and before it the calls that lead to it.
    """

    path: str
    primitive: str
    source: str
    axes: Axes | None
    equations: tuple[Equation, ...]


def probed(path: str, leaf: Any) -> Factored:
    """Returns a weight as a value with a probe for each axis."""
    held = [[1] * axis + [size] + [1] * (leaf.ndim - axis) for axis, size in enumerate(leaf.shape)]
    terms = tuple(
        Term(
            factor_A=Factor.of_aligned(jnp.zeros(shape)),
            factor_B=Factor.of_aligned(jnp.zeros([1] * (leaf.ndim + 1))),
            scale=jnp.zeros(()),
            window=(None,) * leaf.ndim,
            origin=Probe(path, axis, leaf.shape),
        )
        for axis, shape in enumerate(held)
    )
    return Factored(leaf, terms)


def note_roles(
    interpreter: Interpreter,
    equation: Equation,
    value: Factored,
    roles: Sequence[AxisRole],
    *,
    untracked: AxisRole = "batch",
) -> None:
    """Records, for each weight in a value, which role each of its own axes plays.

    Args:
      interpreter: at the equation.
      equation: the contraction, convolution or lookup.
      value: the weights.
      roles: the role of each axis of the value.
      untracked: the role of an axis of a weight that is not an axis of the value.
    """
    reporter = interpreter.reporter
    for path, part in value.parts().items():
        reporter.recorder(
            RolesNote(
                path,
                equation.primitive.name,
                reporter.source_of(equation),
                _original_axes(part.terms, roles, untracked),
                (*reporter.callers, equation),
            )
        )


def of_weights_alone(evaluation: Evaluation) -> Evaluation:
    """Returns an evaluation of weights among themselves and with scalars; an array ends the weight.

    A bias, a norm's scale, a position table and a class token meet activations in sums and
    products of elements. The result is an activation, whatever product it enters next.
    """

    def evaluated(
        interpreter: Interpreter, equation: Equation, inputs: list[Any]
    ) -> Sequence[Any] | None:
        others = [value for value in inputs if not isinstance(value, Factored)]
        if any(jnp.ndim(value) > 0 for value in others):
            return None
        return evaluation(interpreter, equation, inputs)

    return evaluated


def contraction_roles(
    ndim: int, *, contracted: Sequence[int], batch: Sequence[int]
) -> list[AxisRole]:
    """Returns the roles of a weight's axes in a product: all other axes are outputs."""
    roles: list[AxisRole] = ["out"] * ndim
    for axis in contracted:
        roles[axis] = "in"
    for axis in batch:
        roles[axis] = "batch"
    return roles


def _original_axes(
    probes: Sequence[Term], roles: Sequence[AxisRole], untracked: AxisRole
) -> Axes | None:
    """Returns the role of each axis of the original weight, or None if it isn't a matrix here."""
    axes: list[AxisRole | None] = []
    for probe in probes:
        held = {roles[axis] for axis, size in enumerate(probe.lora_A.shape[:-1]) if size != 1}
        if len(held) > 1:
            return None
        assert isinstance(probe.origin, Probe)
        is_unit = probe.origin.shape[probe.origin.axis] == 1
        # An axis that was cut layer by layer is gone; an axis of size 1 can't be seen.
        axes.append(held.pop() if held else None if is_unit else "batch")
    for role in ("in", "out"):
        if role not in axes and None in axes:
            axes[axes.index(None)] = role
    known: Axes = tuple(untracked if axis is None else axis for axis in axes)
    return known if "in" in known and "out" in known else None
