"""A low-rank summand of a weight: its factors, and how they line up with the weight's axes."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from lora_jax._partition import Partition, base_sharding, cut_as
from lora_jax._shapes import Places, Size, aligned


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Range:
    """A window of neighbouring places of an axis.

    Attributes:
      start: the first place.
      stop: the place after the last one.
    """

    start: Size
    stop: Size

    @property
    def width(self) -> Size:
        """The number of places."""
        return self.stop - self.start

    def shifted(self, distance: Size) -> "Range":
        """Returns the window on an axis that begins so many places earlier."""
        return Range(self.start + distance, self.stop + distance)

    def mirrored(self, size: Size) -> "Range":
        """Returns the window on the reversed axis of `size` places."""
        return Range(size - self.stop, size - self.start)

    def taken(self, array: Array, axis: int) -> Array:
        """Returns the part of an array that is in the window."""
        return jax.lax.slice_in_dim(array, self.start, self.stop, axis=axis)

    def spread(self, block: Array, axis: int, size: Size) -> Array:
        """Returns an array of `size` places with a block in the window and zeros around it."""
        padding = [(0, 0)] * block.ndim
        padding[axis] = (self.start, size - self.stop)
        return jnp.pad(block, padding)


# A place that no axis has, also where another axis is joined in front of it.
_BEYOND = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A window of places anywhere on an axis, in any order; those beyond its end hold nothing.

    Attributes:
      places: the places, of shape (width,).
    """

    places: Array | Any

    @property
    def width(self) -> Size:
        """The number of places."""
        return self.places.shape[0]

    def shifted(self, distance: Size) -> "Rows":
        """Returns the window on an axis that begins so many places earlier."""
        return Rows(self.places + distance)

    def within(self, start: Any, width: Size, size: Size) -> "Rows":
        """Returns the window on a part of an axis of `size` places.

        Args:
          start: the first place of the part; as JAX has it, moved to where the part fits.
          width: how many places the part has.
          size: how many the axis has.
        """
        first = jnp.clip(start, 0, size - width).astype(self.places.dtype)
        places = self.places - first
        return Rows(jnp.where((places >= 0) & (places < width), places, _BEYOND))

    def mirrored(self, size: Size) -> "Rows":
        """Returns the window on the reversed axis of `size` places."""
        return Rows(size - 1 - self.places[::-1])

    def taken(self, array: Array, axis: int) -> Array:
        """Returns the part of an array that is in the window."""

        def take(array: Array, places: Array) -> Array:
            return jnp.take(array, places, axis=axis, mode="fill", fill_value=0)

        return cut_as(_sharding_but(array, axis, self.width), take, array, self.places)

    def spread(self, block: Array, axis: int, size: Size) -> Array:
        """Returns an array of `size` places with a block in the window and zeros around it."""
        shape = (*block.shape[:axis], size, *block.shape[axis + 1 :])

        def spread(block: Array, places: Array) -> Array:
            return _added(jnp.zeros(shape, block.dtype), block, places, axis)

        return cut_as(_sharding_but(block, axis, size), spread, block, self.places)

    def added(self, total: Array, block: Array, axis: int) -> Array:
        """Returns an array plus a block in the window: no second array of its size is made."""
        add = functools.partial(_added, axis=axis)
        return cut_as(base_sharding(total), add, total, block, self.places)


def _added(total: Array, block: Array, places: Array, axis: int) -> Array:
    index = (*(slice(None),) * axis, places)
    return total.at[index].add(block, mode="drop")


def _sharding_but(array: Array, axis: int, size: Size) -> NamedSharding | None:
    """Returns how an array is cut that has another, uncut axis of `size` places."""
    partition = Partition.of(array)
    if partition is None:
        return None
    shape = (*array.shape[:axis], size, *array.shape[axis + 1 :])
    return partition.sharding(
        shape, [None if place == axis else place for place in range(len(shape))]
    )


Window = Range | Rows
Windows = tuple[Window | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slot:
    """A slot of a bank, of which a loop reads a layer where it needs it.

    Only what a loop reads need be in memory then, and not all layers of all examples of a batch.

    Attributes:
      bank: the array of all slots (slot, layer, ...).
      index: the slot; out of bounds it holds zeros.
    """

    bank: Array
    index: Array

    def layer(self, place: Array, stored: Array) -> Array:
        """Returns one layer of the slot.

        Args:
          place: which layer.
          stored: the same layer, read outside of the loop, whose derivative this has: each layer's
            own gradient would be as large as the bank.
        """
        return _layer_of_slot(self.bank, self.index, place, stored)


@jax.custom_jvp
def _layer_of_slot(bank: Array, index: Array, place: Array, stored: Array) -> Array:
    starts: list[Any] = [index, place, *[0] * (bank.ndim - 2)]
    held = jax.lax.dynamic_slice(bank, starts, (1, 1, *bank.shape[2:])).squeeze((0, 1))
    return jnp.where((index >= 0) & (index < len(bank)), held, jnp.zeros_like(held))


@_layer_of_slot.defjvp
def _layer_of_slot_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _layer_of_slot(*primals), tangents[-1]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("stored", "slot"),
    meta_fields=("places", "alike_over"),
    drop_fields=("array",),
)
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array as it is stored, and how it lines up with the weight's axes.

    The stored array crosses into the body of a loop or of a rematerialised function, as if the
    model had been written with it, and is aligned inside. Aligning it outside would copy it.

    Attributes:
      stored: the array.
      places: for each axis of the weight, and after them for the rank, which axis of `stored` it
        is, or None if the factor does not depend on it.
      alike_over: mesh axes along which all devices are known to hold the same array, inside a
        `shard_map` without `check_vma`, where JAX's types do not show it.
      slot: where `stored` was read, if it was read out of a bank.
      array: the aligned array, where the trace at hand has one. It does not cross into a body.
    """

    stored: Array | Any
    places: Places
    alike_over: frozenset[str] = frozenset()
    slot: Slot | None = None
    array: Array | None = None

    @classmethod
    def of_aligned(cls, array: Array) -> "Factor":
        """Returns a factor that is aligned already."""
        return cls(array, tuple(range(array.ndim)))

    def rearranged(self, array: Array) -> "Factor":
        """Returns the factor with the elements of its aligned array rearranged."""
        return Factor(array, tuple(range(array.ndim)), self.alike_over)

    def with_stored(self, stored: Any, places: Places | None = None) -> "Factor":
        """Returns the factor with another stored array, lined up like this one by default."""
        return Factor(stored, self.places if places is None else places, self.alike_over)

    def with_aligned(self) -> "Factor":
        """Returns the factor with its aligned array, computed once by the trace at hand."""
        return dataclasses.replace(self, array=aligned(self.stored, self.places))

    @property
    def aligned(self) -> Array:
        """The array with an axis for each axis of the weight, of size 1 or held, and the rank."""
        return aligned(self.stored, self.places) if self.array is None else self.array

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
        return self.with_stored(self.stored.transpose(order), places)

    @property
    def cuts(self) -> Any:
        """What a loop cuts along the first axis to give `layer`; None if all layers are alike."""
        if not self.is_stack:
            return None
        return self.stored, None if self.slot is None else jnp.arange(len(self.stored))

    def layer(self, cut: Any) -> "Factor":
        """Returns the factor of one layer, from one step's part of `cuts`."""
        first, *rest = self.places
        if first is None:
            return self.with_stored(self.stored, tuple(rest))
        places = tuple(None if place is None else place - 1 for place in rest)
        if cut is None:
            return self.with_stored(self.stored[0], places)
        stored, place = cut
        return self.with_stored(
            stored if self.slot is None else self.slot.layer(place, stored), places
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
      window: for each axis of the weight, the window outside of which the term is zero, or None for
        the whole axis. Concatenation makes ranges; an adapter of single rows has them as a window.
        The factors hold the places of the window alone.
      origin: what the term comes from; as text, the path of its weight in the arguments.
      scale_alike_over: mesh axes along which all devices are known to hold the same scale.
    """

    factor_A: Factor
    factor_B: Factor
    scale: Array | Any
    window: Windows
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

    @property
    def building_flops(self) -> Size:
        """The FLOPs per element of building the term and adding it to a weight."""
        is_product = self.lora_A.size != 1 and self.lora_B.size != 1
        return 2 * self.rank * is_product + 1

    def moved(self, lora_A: Array, lora_B: Array, window: Windows | None = None) -> "Term":
        """Returns the term with other aligned factors, and another window if one is given."""
        return dataclasses.replace(
            self,
            factor_A=Factor.of_aligned(lora_A),
            factor_B=Factor.of_aligned(lora_B),
            window=self.window if window is None else window,
        )

    def rearranged(self, lora_A: Array, lora_B: Array, window: Windows | None = None) -> "Term":
        """Returns the same as `moved` where the factors' elements are only rearranged."""
        return dataclasses.replace(
            self,
            factor_A=self.factor_A.rearranged(lora_A),
            factor_B=self.factor_B.rearranged(lora_B),
            window=self.window if window is None else window,
        )


def without_windows(term: Term, shape: tuple[Size, ...]) -> Term:
    """Returns the same term with its factors set to zero outside of its windows."""
    if all(window is None for window in term.window):
        return term
    lora_A, lora_B = term.lora_A, term.lora_B
    for axis, window in enumerate(term.window):
        if window is None:
            continue
        A_depends = lora_A.shape[axis] != 1
        if A_depends:
            lora_A = padded(lora_A, axis, window, shape[axis])
        if lora_B.shape[axis] != 1 or not A_depends:
            lora_B = padded(lora_B, axis, window, shape[axis])
    return term.rearranged(lora_A, lora_B, (None,) * len(shape))


def block_shape(term: Term, shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """Returns the shape of the part of a weight of `shape` in which `term` is not zero."""
    return tuple(
        size if window is None else window.width
        for size, window in zip(shape, term.window, strict=True)
    )


def padded(array: Array, axis: int, window: Window, size: Size) -> Array:
    """Returns `array`, which fills `window` of an axis or is constant in it, with zeros around."""
    shape = (*array.shape[:axis], window.width, *array.shape[axis + 1 :])
    return window.spread(jnp.broadcast_to(array, shape), axis, size)


def spread_block(block: Array, windows: Windows, shape: Sequence[Size]) -> Array:
    """Returns an array of this shape with a block that fills the windows, and zeros around it."""
    for axis, window in enumerate(windows):
        if window is not None:
            block = window.spread(block, axis, shape[axis])
    return block


def plus_block(total: Array, block: Array, windows: Windows) -> Array:
    """Returns an array plus a block of its dtype that fills the windows of its axes."""
    axis = next((place for place, each in enumerate(windows) if isinstance(each, Rows)), None)
    if axis is None:
        return total + spread_block(block, windows, total.shape)
    rows, others = windows[axis], (*windows[:axis], None, *windows[axis + 1 :])
    assert isinstance(rows, Rows)
    return rows.added(total, spread_block(block, others, total.shape), axis)
