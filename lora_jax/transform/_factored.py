"""The symbolic value that the interpreter carries for an adapted weight."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from lora_jax._algebra import gain
from lora_jax._dtypes import common_dtype
from lora_jax._shapes import Places, Size, aligned, factor_places, magnitude_places, spread_layers
from lora_jax._weight import LoRAWeight, check_single
from lora_jax.transform._product import product, without_unit_axes

Window = tuple[Size, Size]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array as it is stored, and how it lines up with the weight's axes.

    What crosses into the body of a loop or of a rematerialised function is the stored array, as if
    the model had been written with it; it is aligned inside. Aligned before, it would be copied.

    Attributes:
      stored: the array.
      places: for each axis of the weight, and after them for the rank, which axis of `stored` it
        is, or None if the factor does not depend on it.
      alike_over: mesh axes along which all devices are known to hold the same array, inside a
        `shard_map` without `check_vma`, where JAX's types do not say it.
    """

    stored: Array | Any
    places: Places = dataclasses.field(metadata={"static": True})
    alike_over: frozenset[str] = dataclasses.field(default=frozenset(), metadata={"static": True})

    @classmethod
    def of_aligned(cls, array: Array) -> "Factor":
        """Returns a factor that is aligned already."""
        return cls(array, tuple(range(array.ndim)))

    def rearranged(self, array: Array) -> "Factor":
        """Returns the factor with the elements of its aligned array in other places."""
        return Factor(array, tuple(range(array.ndim)), self.alike_over)

    @functools.cached_property
    def aligned(self) -> Array:
        """The array with an axis for each axis of the weight, of size 1 or held, and the rank."""
        return aligned(self.stored, self.places)

    def copied(self) -> "Factor":
        """Returns the same factor, aligned by the trace that asks for it."""
        copy = dataclasses.replace(self)
        assert copy.aligned.ndim == len(self.places)
        return copy

    @property
    def is_stack(self) -> bool:
        """Whether a loop can cut the stored array along the weight's first axis."""
        return self.places[0] == 0 and self.stored.shape[0] != 1

    def as_stack(self) -> "Factor":
        """Returns the same factor, the weight's first axis stored first if it is held at all."""
        first = self.places[0]
        if not first:
            return self
        order = (first, *(axis for axis in range(self.stored.ndim) if axis != first))
        places = tuple(None if place is None else order.index(place) for place in self.places)
        return dataclasses.replace(self, stored=self.stored.transpose(order), places=places)

    def layer(self, cut: Array | None) -> "Factor":
        """Returns the factor of one layer: of a cut of `stored`, or the one that all share.

        The body of a loop asks for it, so it aligns nothing here: `aligned` would keep what the
        body's trace computed, and hand it to what comes after the loop.
        """
        first, *rest = self.places
        if first is None:
            return dataclasses.replace(self, places=tuple(rest))
        places = tuple(None if place is None else place - 1 for place in rest)
        return dataclasses.replace(
            self, stored=self.stored[0] if cut is None else cut, places=places
        )

    def spec(self, axes: Sequence[Any] | PartitionSpec) -> PartitionSpec:
        """Returns how `stored` is cut where the weight's axes are cut as `axes` says.

        The factor inherits the partition of the axes that it holds; the rank is not cut.
        """
        cut = {
            place: axis
            for axis, place, size in zip(axes, self.places, self.aligned.shape, strict=False)
            if place is not None and size != 1
        }
        return PartitionSpec(*(cut.get(place) for place in range(self.stored.ndim)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """One low-rank summand of a factored weight: scale · Σ_r lora_A · lora_B.

    Both factors, aligned, have an axis for each axis of the weight, and the rank last. On an axis
    that a factor does not depend on, its size is 1, so that their product broadcasts to the weight.
    This makes rules short: whatever an op does to the weight's axes, it does to the factors'.

    Attributes:
      factor_A: the first factor.
      factor_B: the second factor.
      scale: a scalar.
      window: for each axis of the weight, the range (start, stop) outside of which the term is
        zero, or None for the whole axis. Concatenation makes windows.
      origin: what the term comes from; as text, the path of its weight in the arguments.
      scale_alike_over: mesh axes along which all devices are known to hold the same scale.
    """

    factor_A: Factor
    factor_B: Factor
    scale: Array | Any
    window: tuple[Window | None, ...] = dataclasses.field(metadata={"static": True})
    origin: Hashable = dataclasses.field(metadata={"static": True})
    scale_alike_over: frozenset[str] = dataclasses.field(
        default=frozenset(), metadata={"static": True}
    )

    @property
    def lora_A(self) -> Array:
        """The first factor, aligned with the weight's axes."""
        return self.factor_A.aligned

    @property
    def lora_B(self) -> Array:
        """The second factor, aligned with the weight's axes."""
        return self.factor_B.aligned

    @property
    def rank(self) -> int:
        """The size of the axis that the product of the factors sums over."""
        return self.lora_A.shape[-1]

    def moved(
        self, lora_A: Array, lora_B: Array, window: tuple[Window | None, ...] | None = None
    ) -> "Term":
        """Returns the term with other aligned factors, and another window if one is given."""
        return dataclasses.replace(
            self,
            factor_A=Factor.of_aligned(lora_A),
            factor_B=Factor.of_aligned(lora_B),
            window=self.window if window is None else window,
        )

    def rearranged(
        self, lora_A: Array, lora_B: Array, window: tuple[Window | None, ...] | None = None
    ) -> "Term":
        """Returns the same as `moved` where only the places of the factors' elements change."""
        return dataclasses.replace(
            self,
            factor_A=self.factor_A.rearranged(lora_A),
            factor_B=self.factor_B.rearranged(lora_B),
            window=self.window if window is None else window,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """The value gain ∘ (base + Σ terms), which is never built unless an op leaves no other way.

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

    def copied(self) -> "Factored":
        """Returns the same value, aligned by the trace that asks for it."""
        return self.map_factors(Factor.copied)

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
    """Returns the symbolic value of an adapted weight; nothing frozen receives a gradient."""
    check_single(path, weight)
    weight = _with_gradients_stopped(weight)
    A_places, B_places = factor_places(weight.axes)
    term = Term(
        factor_A=_factor(weight, weight.lora_A, A_places),
        factor_B=_factor(weight, weight.lora_B, B_places),
        scale=weight.scale,
        window=(None,) * len(weight.axes),
        origin=path,
    )
    return Factored(
        base=weight.base,
        terms=(term,),
        gain=None
        if weight.magnitude is None
        else _factor(weight, gain(weight), magnitude_places(weight.axes), elsewhere=1),
    )


def _with_gradients_stopped(weight: LoRAWeight) -> LoRAWeight:
    stopped = {
        name: jax.lax.stop_gradient(getattr(weight, name))
        for name in ("base", "scale", *weight.frozen)
    }
    return dataclasses.replace(weight, **stopped)


def _factor(weight: LoRAWeight, array: Array, places: Places, *, elsewhere: int = 0) -> Factor:
    """Returns an array of the adapted layers as one of all; the rest changes nothing there."""
    if weight.layers is not None:
        axis = weight.axes.index("batch")
        array = spread_layers(array, places[axis], weight.layers, weight.shape[axis], elsewhere)
    return Factor(array, places)


def base_of(value: Any) -> Any:
    """Returns the base of a factored value, or the value itself if it is an array."""
    return value.base if isinstance(value, Factored) else value


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


def without_windows(term: Term, shape: tuple[Size, ...]) -> Term:
    """Returns the same term with factors that are themselves zero outside of its windows."""
    if all(window is None for window in term.window):
        return term
    lora_A, lora_B = term.lora_A, term.lora_B
    for axis, window in enumerate(term.window):
        if window is None:
            continue
        A_depends = lora_A.shape[axis] != 1
        if A_depends:
            lora_A = _padded(lora_A, axis, window, shape[axis])
        if lora_B.shape[axis] != 1 or not A_depends:
            lora_B = _padded(lora_B, axis, window, shape[axis])
    return term.rearranged(lora_A, lora_B, (None,) * len(shape))


def block_shape(term: Term, shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """Returns the shape of the part of a weight of `shape` in which `term` is not zero."""
    return tuple(
        size if window is None else window[1] - window[0]
        for size, window in zip(shape, term.window, strict=True)
    )


def is_as_exact_dense(value: Factored) -> bool:
    """Says whether the weight's dtype holds all that the terms change of it."""
    factors = [factor.dtype for term in value.terms for factor in (term.lora_A, term.lora_B)]
    return bool(common_dtype(value.dtype, *factors) == value.dtype)


def dense_flops(value: Factored) -> Size:
    """Returns the operations that building base + Σ terms takes."""
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
            block = _padded(block, axis, window, shape[axis])
    return block


def _padded(array: Array, axis: int, window: Window, size: Size) -> Array:
    """Returns `array`, which fills `window` of an axis or is constant in it, with zeros around."""
    width = window[1] - window[0]
    array = jnp.broadcast_to(array, (*array.shape[:axis], width, *array.shape[axis + 1 :]))
    padding = [(0, 0)] * array.ndim
    padding[axis] = (window[0], size - window[1])
    return jnp.pad(array, padding)
