"""The symbolic value that the interpreter carries for an adapted weight."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._algebra import gain
from lora_jax._dtypes import common_dtype
from lora_jax._shapes import Places, Size, factor_places, magnitude_places, spread_layers
from lora_jax._weight import LoRAWeight, is_lora_weight
from lora_jax.transform._product import product, without_unit_axes
from lora_jax.transform._terms import Factor, Term, block_shape, padded, without_windows


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
        """Returns the same value with factors that the trace at hand has aligned."""
        return self.map_factors(Factor.with_aligned)

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


def factored_weight(weight: LoRAWeight, path: str) -> Factored:
    """Returns the symbolic value of an adapted weight; nothing frozen receives a gradient.

    Where the base is a node itself, its terms come first. A gain multiplies what it was made for,
    so that a base with a gain is built.
    """
    stopped = {
        name: jax.lax.stop_gradient(getattr(weight, name)) for name in ("scale", *weight.frozen)
    }
    weight = dataclasses.replace(weight, **stopped)
    base, terms = _base_and_terms(weight.base, path)
    return Factored(
        base=base,
        terms=(*terms, _term(weight, path)),
        gain=None
        if weight.magnitude is None
        else _factor(weight, gain(weight), magnitude_places(weight.axes), elsewhere=1),
    )


def _base_and_terms(base: Any, path: str) -> tuple[Array, tuple[Term, ...]]:
    """Returns the array at the bottom of a base, and the terms that the base adds itself."""
    if not is_lora_weight(base):
        return jax.lax.stop_gradient(base), ()
    value = factored_weight(base, path)
    return (value.base, value.terms) if value.gain is None else (dense_value(value), ())


def _term(weight: LoRAWeight, path: str) -> Term:
    A_places, B_places = factor_places(weight.axes)
    return Term(
        factor_A=_factor(weight, weight.lora_A, A_places),
        factor_B=_factor(weight, weight.lora_B, B_places),
        scale=weight.scale,
        window=(None,) * len(weight.axes),
        origin=path,
    )


def _factor(weight: LoRAWeight, array: Array, places: Places, *, elsewhere: int = 0) -> Factor:
    """Returns an array of the adapted layers extended to all; the others get no change."""
    if weight.layers is not None:
        axis = weight.axes.index("batch")
        array = spread_layers(array, places[axis], weight.layers, weight.shape[axis], elsewhere)
    return Factor(array, places)


def terms_of(value: Any) -> tuple[Term, ...]:
    """Returns the terms of a factored value; an array has none."""
    return value.terms if isinstance(value, Factored) else ()


def gain_of(value: Any) -> Factor | None:
    """Returns the gain of a factored value; an array has none."""
    return value.gain if isinstance(value, Factored) else None


def dense_value(value: Factored) -> Array:
    """Returns gain ∘ (base + Σ terms) in the base's dtype, computed in the widest one."""
    total = value.base
    for term in value.terms:
        change = _dense_term(term, value.shape, value.dtype)
        wide = common_dtype(total.dtype, change.dtype)
        total = total.astype(wide) + change.astype(wide)
    if value.gain is not None:
        total = multiplied(total, value.gain.aligned.squeeze(-1))
    return total.astype(value.dtype)


def multiplied(array: Array, gain: Array) -> Array:
    """Returns array · gain in the wider dtype of the two."""
    wide = common_dtype(array.dtype, gain.dtype)
    return array.astype(wide) * gain.astype(wide)


def is_as_exact_dense(value: Factored) -> bool:
    """Says whether the weight's dtype is wide enough for the terms' changes."""
    factors = [factor.dtype for term in value.terms for factor in (term.lora_A, term.lora_B)]
    return bool(common_dtype(value.dtype, *factors) == value.dtype)


def dense_flops(value: Factored) -> Size:
    """Returns the FLOPs of building base + Σ terms."""
    return sum(
        (2 * term.rank + 1) * math.prod(block_shape(term, value.shape)) for term in value.terms
    )


def _dense_term(term: Term, shape: tuple[Size, ...], dtype: Any) -> Array:
    """Returns scale · Σ_r lora_A · lora_B in the weight's shape, in its dtype if that is wider."""
    axes = range(len(shape))
    rank_label = len(shape)
    wide = common_dtype(dtype, term.lora_A.dtype, term.lora_B.dtype)
    joined = product(
        [
            without_unit_axes(factor.astype(wide), (*axes, rank_label))
            for factor in (term.lora_A, term.lora_B)
        ],
        axes,
        scale=term.scale,
        precision=jax.lax.Precision.HIGHEST,
    )
    absent = [axis for axis in axes if axis not in joined.labels]
    block = jnp.broadcast_to(jnp.expand_dims(joined.array, absent), block_shape(term, shape))
    for axis, window in enumerate(term.window):
        if window is not None:
            block = padded(block, axis, window, shape[axis])
    return block
