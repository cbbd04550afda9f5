"""The symbolic value that the interpreter carries for an adapted weight."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from lora_jax._dtypes import common_dtype
from lora_jax._shapes import Size
from lora_jax.transform._deferred import is_deferred
from lora_jax.transform._product import sharding_of
from lora_jax.transform._terms import Factor, Rows, Term, without_windows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """The value gain ∘ (base + Σ terms), built only where an op leaves no other way.

    Attributes:
      base: the frozen weight, with whatever ops have moved its axes so far.
      terms: the low-rank summands.
      gain: what the sum is multiplied by, element for element, or None. It is aligned as a factor
        of rank 1, so that rules move it as they move factors.
    """

    base: Array | Any
    terms: tuple[Term, ...]
    gain: Factor | None = None

    @property
    def path(self) -> str:
        """The paths of the weights that make up this value, for messages."""
        return " + ".join(self.parts())

    def parts(self) -> dict[str, "Factored"]:
        """Returns, for the path of each weight that makes up this value, the terms it adds."""
        by_path: dict[str, list[Term]] = {}
        for term in self.terms:
            by_path.setdefault(str(term.origin), []).append(term)
        return {
            path: dataclasses.replace(self, terms=tuple(terms)) for path, terms in by_path.items()
        }

    def without_windows(self, axes: Collection[int] | None = None) -> "Factored":
        """Returns the same value, with no window on these axes, or on any."""
        terms = tuple(
            without_windows(term, self.shape)
            if any(
                window is not None and (axes is None or axis in axes)
                for axis, window in enumerate(term.window)
            )
            else term
            for term in self.terms
        )
        return dataclasses.replace(self, terms=terms)

    def map_factors(self, function: Callable[[Factor], Factor]) -> "Factored":
        """Returns the value with a function applied to each factor, and to the gain."""
        terms = tuple(
            dataclasses.replace(
                term, factor_A=function(term.factor_A), factor_B=function(term.factor_B)
            )
            for term in self.terms
        )
        return dataclasses.replace(
            self, terms=terms, gain=None if self.gain is None else function(self.gain)
        )

    def with_aligned(self) -> "Factored":
        """Returns the same value with factors that the trace at hand has aligned.

        A constant scale may come as an array of NumPy, from a function with its own derivative.
        """
        terms = tuple(
            dataclasses.replace(term, scale=jnp.asarray(term.scale)) for term in self.terms
        )
        return dataclasses.replace(self, terms=terms).map_factors(Factor.with_aligned)

    @property
    def is_weight(self) -> bool:
        """Whether this is more than an array."""
        return bool(self.terms) or self.gain is not None or is_deferred(self.base)

    @property
    def has_rows(self) -> bool:
        """Whether a term changes single rows."""
        return any(isinstance(window, Rows) for term in self.terms for window in term.window)

    @property
    def held_by_gain(self) -> frozenset[int]:
        """The axes on which the gain is not the same everywhere."""
        if self.gain is None:
            return frozenset()
        return frozenset(
            axis for axis, size in enumerate(self.gain.aligned.shape[:-1]) if size != 1
        )

    @property
    def shape(self) -> tuple[Size, ...]:
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


def terms_of(value: Any) -> tuple[Term, ...]:
    """Returns the terms of a factored value; an array has none."""
    return value.terms if isinstance(value, Factored) else ()


def gain_of(value: Any) -> Factor | None:
    """Returns the gain of a factored value; an array has none."""
    return value.gain if isinstance(value, Factored) else None


def multiplied(array: Array, gain: Array) -> Array:
    """Returns array · gain in the wider dtype of the two, cut over a mesh as the array is.

    A gain is cut as its weight is, and a model says how its own arrays are cut: a product of the
    weight may be cut in another way, and so may what is summed over with it.
    """
    wide = common_dtype(array.dtype, gain.dtype)
    return array.astype(wide) * _cut_as(array, gain).astype(wide)


def _cut_as(array: Array, gain: Array) -> Array:
    """Returns a gain, of size 1 on some axes, cut over explicit mesh axes as an array is."""
    sharding = sharding_of(array)
    if sharding is None:
        return gain
    cuts = (*sharding.spec, *(None,) * array.ndim)
    spec = PartitionSpec(*(c if n != 1 else None for c, n in zip(cuts, gain.shape, strict=False)))
    return jax.sharding.reshard(gain, NamedSharding(sharding.mesh, spec))
