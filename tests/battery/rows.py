"""The product of layouts, ops, options, bases and transforms, and what of it the suite runs."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from tests.battery.bases import BASES, Base
from tests.battery.covering import covering_array
from tests.battery.layouts import LAYOUTS, Layout
from tests.battery.ops import OPS
from tests.battery.options import OPTIONS, Option
from tests.battery.registry import IS_STRICT, Op
from tests.battery.transforms import TRANSFORMS, Transform


@dataclasses.dataclass(frozen=True)
class Row:
    """One model, wrapped and called in one way."""

    op: Op
    layout: Layout
    option: Option
    base: Base
    transform: Transform

    @property
    def name(self) -> str:
        return (
            f"{self.op.family}.{self.op.name} | {self.layout.name} | {self.option.name} | "
            f"{self.base.name} | {self.transform.name}"
        )

    @classmethod
    def named(cls, name: str) -> "Row":
        """Returns the row of this name."""
        op, layout, option, base, transform = name.split(" | ")
        return cls(
            next(each for each in OPS if op == f"{each.family}.{each.name}"),
            _called(LAYOUTS, layout),
            _called(OPTIONS, option),
            _called(BASES, base),
            _called(TRANSFORMS, transform),
        )

    @property
    def kind(self) -> str:
        """What is compared: gradients only of what JAX differentiates."""
        if self.transform.kind == "gradients" and not self.op.reverse:
            return "results"
        return self.transform.kind

    @property
    def in_custom_rule(self) -> bool:
        return any(call.how == "custom" for call in self.option.calls)

    @property
    def tolerance(self) -> float:
        return max(self.op.tolerance, self.option.tolerance)


_FACTORS = (OPS, LAYOUTS, OPTIONS, BASES, TRANSFORMS)


def _called(values: Sequence[Any], name: str) -> Any:
    return next(value for value in values if value.name == name)


def is_possible(row: Row) -> bool:
    """Says whether the model itself, without adapters, can be called so."""
    op, option, transform = row.op, row.option, row.transform
    return (
        len(row.layout.axes) in op.ndims
        and (option.layers is None or "batch" in row.layout.axes)
        and (option.rows is None or row.layout.axes.count("in") == 1)
        and (op.batchable or ("vmap" not in transform.name and transform.name != "dropout"))
        and (op.forward or (not row.in_custom_rule and transform.name != "jvp"))
        and (transform.name != "symbolic rows" or (op.symbolic and option.mesh is None))
        and (option.mesh is None or op.meshes)
        and (option.mesh != "explicit" or op.explicit)
        and (row.base.format is None or option.mesh != "explicit" or _is_cut_in_blocks(row.layout))
    )


def _is_cut_in_blocks(layout: Layout) -> bool:
    """Says whether codes can be cut as their weight is: along the first of its inputs, or others.

    Codes that can't are whole on every device. On an explicit mesh the model would see it.
    """
    return layout.axes[-1] != "in" or layout.axes.count("in") == 1


def jax_refuses(row: Row) -> bool:
    """Says whether JAX can't do it with plain weights.

    On an explicit mesh, a `cond` under vmap selects by a predicate of another sharding, and the
    transpose of `reshard` gives the cotangent another sharding than the weight's.
    """
    if row.op.name == "kept_in_place" and IS_STRICT and row.in_custom_rule:
        return True
    return (
        row.option.mesh == "explicit"
        and "vmap" in row.transform.name
        and row.op.name in ("conditional", "kept_in_place")
    )


def all_rows() -> Iterator[Row]:
    """Returns the whole product."""
    rows = (Row(*values) for values in itertools.product(*_FACTORS))
    return (row for row in rows if is_possible(row) and not jax_refuses(row))


@functools.cache
def suite_rows() -> tuple[Row, ...]:
    """Returns rows in which every pair of values occurs that can."""
    rows = covering_array(
        _FACTORS, lambda v: is_possible(Row(*v)), prefers=lambda v: Row(*v).base.format is None
    )
    return tuple(row for row in (Row(*v) for v in rows) if not jax_refuses(row))
