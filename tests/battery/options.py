"""Kinds of adapters and of use: one row for each way in which a weight can be wrapped and met."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the op by the model.

    Attributes:
      name: what its results are called by.
      swapped: whether the two weights change places.
      other_rows: whether it gets other activations.
      how: as it is, within a function that is jitted once for all calls, or that within one with a
        derivative of its own.
    """

    name: str
    swapped: bool = False
    other_rows: bool = False
    how: str = "plain"


ONCE = (Call("once"),)
TWO_USES = (Call("first"), Call("second", other_rows=True))
SHARED = (
    Call("v", swapped=True, how="jit"),
    Call("w", how="jit"),
    Call("w again", other_rows=True, how="jit"),
)
CUSTOM_FIRST = (Call("inside", how="custom"), Call("outside", how="jit"))
CUSTOM_LATER = (Call("outside", how="jit"), Call("inside", how="custom"))


@dataclasses.dataclass(frozen=True)
class Option:
    """How a weight is wrapped, and how the model calls the op.

    Attributes:
      name: its name.
      dora: whether each output feature has a magnitude.
      layers: the places of the batch axis that are adapted.
      rows: the places of the input axis that are adapted; None for low-rank adapters.
      dtype: that of the weight; `other_dtype` that of the second weight.
      narrow_factors: whether factors, scale and magnitude are of the weight's dtype too.
      zero_feature: whether an output feature of the weight is zero.
      calls: how the model calls the op.
      twice: whether an op's weights are both operands of one equation.
      mesh: None, or the kind of axis that cuts each weight's last axis over two devices.
    """

    name: str
    dora: bool = False
    layers: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    dtype: Any = np.float32
    other_dtype: Any = None
    narrow_factors: bool = False
    zero_feature: bool = False
    calls: tuple[Call, ...] = ONCE
    twice: bool = False
    mesh: str | None = None

    def dtype_of(self, name: str) -> Any:
        return self.other_dtype if name == "v" and self.other_dtype else self.dtype

    @property
    def tolerance(self) -> float:
        """The relative error that the narrowest dtype makes; DoRA's gain rounds once more."""
        widths = [float(jnp.finfo(self.dtype_of(name)).eps) for name in "wv"]
        roundings = 16 if self.narrow_factors else 6
        return max(2e-5 if self.dora else 1e-5, roundings * max(widths))


OPTIONS = [
    Option("lora"),
    Option("dora", dora=True),
    Option("some layers", layers=(1, 2)),
    Option("some layers, dora", layers=(0, 2), dora=True),
    Option("bfloat16", dtype=jnp.bfloat16),
    Option("float16, dora", dtype=np.float16, dora=True, zero_feature=True),
    Option("bfloat16 throughout, dora", dtype=jnp.bfloat16, dora=True, narrow_factors=True),
    Option("twice", calls=TWO_USES, twice=True),
    Option("twice, dora", calls=TWO_USES, twice=True, dora=True),
    Option("shared", calls=SHARED),
    Option("shared, two dtypes, dora", calls=SHARED, other_dtype=jnp.bfloat16, dora=True),
    Option("inside a custom rule, then outside", calls=CUSTOM_FIRST),
    Option("outside, then inside a custom rule, dora", calls=CUSTOM_LATER, dora=True),
    Option("rows", rows=(2, 0)),
    Option("one row, bfloat16, twice", rows=(3,), dtype=jnp.bfloat16, calls=TWO_USES, twice=True),
    Option("rows, shared, two dtypes", rows=(2, 0), calls=SHARED, other_dtype=jnp.bfloat16),
    Option("rows, inside a custom rule, then outside", rows=(0, 3), calls=CUSTOM_FIRST),
    Option("rows, explicit mesh", rows=(3, 0), mesh="explicit"),
    Option("auto mesh", mesh="auto"),
    Option("explicit mesh", mesh="explicit"),
    Option("explicit mesh, dora", mesh="explicit", dora=True),
]
