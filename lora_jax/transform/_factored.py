"""The symbolic value that the interpreter carries for an adapted weight."""

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._dtypes import common_dtype
from lora_jax._weight import LoRAWeight, aligned_factors
from lora_jax.transform._product import product, without_unit_axes

Window = tuple[int, int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """One low-rank summand of a factored weight: scale · Σ_r lora_A · lora_B.

    Both factors have an axis for each axis of the weight, and the rank last. On an axis that a
    factor does not depend on, its size is 1, so that their product broadcasts to the weight. This
    is what makes rules short: whatever an op does to the weight's axes, it does to the factors'.

    Attributes:
      lora_A: the first factor.
      lora_B: the second factor.
      scale: a scalar.
      window: for each axis of the weight, the range (start, stop) outside of which the term is
        zero, or None for the whole axis. Concatenation makes windows.
      origin: what the term comes from; as text, the path of its weight in the arguments.
    """

    lora_A: Array
    lora_B: Array
    scale: Array
    window: tuple[Window | None, ...] = dataclasses.field(metadata={"static": True})
    origin: Hashable = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The size of the axis that the product of the factors sums over."""
        return self.lora_A.shape[-1]

    @property
    def dtype(self) -> Any:
        """The dtype in which the product is taken."""
        return common_dtype(self.lora_A.dtype, self.lora_B.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """The value base + Σ terms, which is never built unless an op leaves no other way.

    Attributes:
      base: the frozen weight, with whatever ops have moved its axes so far.
      terms: the low-rank summands.
    """

    base: Array
    terms: tuple[Term, ...]

    @property
    def path(self) -> str:
        """The paths of the weights that make up this value, for messages."""
        return " + ".join(self.parts())

    def parts(self) -> dict[str, "Factored"]:
        """Returns, for the path of each weight that makes up this value, the terms it adds."""
        by_path: dict[str, list[Term]] = {}
        for term in self.terms:
            by_path.setdefault(str(term.origin), []).append(term)
        return {path: Factored(self.base, tuple(terms)) for path, terms in by_path.items()}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the value."""
        return self.base.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of the value."""
        return self.base.dtype


def factored_weight(weight: LoRAWeight, path: str) -> Factored:
    """Returns the symbolic value of an adapted weight; nothing frozen receives a gradient."""
    lora_A, lora_B = aligned_factors(weight)
    term = Term(
        lora_A=lora_A,
        lora_B=lora_B,
        scale=jax.lax.stop_gradient(weight.scale),
        window=(None,) * (lora_A.ndim - 1),
        origin=path,
    )
    return Factored(base=jax.lax.stop_gradient(weight.base), terms=(term,))


def dense_value(value: Factored) -> Array:
    """Returns base + Σ terms as an array of the base's dtype, summed in the widest one."""
    total = value.base
    for term in value.terms:
        change = _dense_term(term, value.shape)
        wide = common_dtype(total.dtype, change.dtype)
        total = total.astype(wide) + change.astype(wide)
    return total.astype(value.dtype)


def without_windows(term: Term, shape: tuple[int, ...]) -> Term:
    """Returns the same term with factors that are themselves zero outside of its windows."""
    lora_A, lora_B = term.lora_A, term.lora_B
    for axis, window in enumerate(term.window):
        if window is None:
            continue
        A_depends = lora_A.shape[axis] != 1
        if A_depends:
            lora_A = _padded(lora_A, axis, window, shape[axis])
        if lora_B.shape[axis] != 1 or not A_depends:
            lora_B = _padded(lora_B, axis, window, shape[axis])
    return dataclasses.replace(term, lora_A=lora_A, lora_B=lora_B, window=(None,) * len(shape))


def block_shape(term: Term, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the part of a weight of `shape` in which `term` is not zero."""
    return tuple(
        size if window is None else window[1] - window[0]
        for size, window in zip(shape, term.window, strict=True)
    )


def dense_flops(value: Factored) -> int:
    """Returns the operations that building base + Σ terms takes."""
    return sum(
        (2 * term.rank + 1) * math.prod(block_shape(term, value.shape)) for term in value.terms
    )


def _dense_term(term: Term, shape: tuple[int, ...]) -> Array:
    """Returns scale · Σ_r lora_A · lora_B in the weight's shape."""
    axes = range(len(shape))
    rank_label = len(shape)
    joined = product(
        [without_unit_axes(factor, (*axes, rank_label)) for factor in (term.lora_A, term.lora_B)],
        axes,
        scale=term.scale,
        precision=jax.lax.Precision.HIGHEST,
    )
    absent = [axis for axis in axes if axis not in joined.labels]
    block = jnp.broadcast_to(jnp.expand_dims(joined.array, absent), block_shape(term, shape))
    for axis, window in enumerate(term.window):
        if window is not None:
            block = _padded(block, axis, window, shape[axis])
    return block


def _padded(array: Array, axis: int, window: Window, size: int) -> Array:
    """Returns `array`, which fills `window` of an axis or is constant in it, with zeros around."""
    width = window[1] - window[0]
    array = jnp.broadcast_to(array, (*array.shape[:axis], width, *array.shape[axis + 1 :]))
    padding = [(0, 0)] * array.ndim
    padding[axis] = (window[0], size - window[1])
    return jnp.pad(array, padding)
