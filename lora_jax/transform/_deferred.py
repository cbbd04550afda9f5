"""Bases that become arrays only where an op needs them, and the ops that move them.

A base is deferred if it has a method `dequantize`. Here are those that ops make of a quantised
weight: the weight cut along batch axes or with its axes in another order is quantised itself, in
another dtype it is a `Cast`, and after any other op it is a `Moved`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax._compat import Equation, Primitive, evaluate_equation, primitives
from lora_jax._shapes import Size
from lora_jax.quantization._foreign import ForeignWeight
from lora_jax.quantization._weight import QuantizedWeight


class Deferred(abc.ABC):
    """What holds for every deferred base made here: it has the shape of what it is made of."""

    @property
    @abc.abstractmethod
    def like(self) -> Any:
        """What has the shape and the dtype of this base."""

    @property
    def shape(self) -> tuple[Size, ...]:
        """The shape of the array."""
        return self.like.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the array."""
        return self.like.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.like.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cast(Deferred):
    """A base in another dtype; it is cut along its batch axes as the base is.

    Attributes:
      base: the base.
      new_dtype: the dtype.
    """

    base: Any
    new_dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def like(self) -> Any:
        """The base in the new dtype."""
        return jax.ShapeDtypeStruct(self.base.shape, self.new_dtype)

    def dequantize(self) -> Array:
        """Returns the base as an array of the new dtype."""
        return dequantized(self.base).astype(self.new_dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moved(Deferred):
    """An output of an equation on bases.

    Attributes:
      inputs: the inputs of the equation, bases and arrays.
      equation: the equation.
      place: which of its outputs.
    """

    inputs: Sequence[Any]
    equation: Equation = dataclasses.field(metadata={"static": True})
    place: int = dataclasses.field(metadata={"static": True})

    @property
    def like(self) -> Any:
        """The type of the output."""
        return self.equation.outvars[self.place].aval

    def dequantize(self) -> Array:
        """Returns the output, computed from arrays."""
        return evaluate_equation(self.equation, list(map(dequantized, self.inputs)))[self.place]


def is_deferred(base: Any) -> bool:
    """Says whether a base becomes an array only where an op needs it."""
    return hasattr(base, "dequantize")


def dequantized(base: Any) -> Any:
    """Returns a base as an array."""
    return base.dequantize() if is_deferred(base) else base


def batch_ndim(base: Any) -> int:
    """Returns how many leading axes all arrays of a base have in common."""
    if isinstance(base, Cast):
        return batch_ndim(base.base)
    return base.batch_ndim if isinstance(base, QuantizedWeight | ForeignWeight) else 0


def moved(equation: Equation, inputs: Sequence[Any]) -> list[Any]:
    """Returns the outputs of an equation on deferred bases as bases."""
    move = _moves().get(equation.primitive)
    found = move(equation, *inputs) if move is not None else None
    if found is not None:
        return found
    return [Moved(list(inputs), equation, place) for place in range(len(equation.outvars))]


def _kept(equation: Equation, base: Any) -> list[Any]:
    """Returns a base that an op passes on: it is frozen, and nothing of it is saved by name."""
    return [base]


def _converted(equation: Equation, base: Any) -> list[Any] | None:
    dtype = equation.params["new_dtype"]
    return [Cast(base, dtype)] if jnp.issubdtype(dtype, jnp.floating) else None


def _transposed(equation: Equation, base: Any) -> list[Any] | None:
    order = equation.params["permutation"]
    if isinstance(base, Cast):
        inner = _transposed(equation, base.base)
        return None if inner is None else [Cast(inner[0], base.new_dtype)]
    batch = batch_ndim(base)
    if not isinstance(base, QuantizedWeight) or order[:batch] != tuple(range(batch)):
        return None
    return [base.transpose(order)]


def _reshaped(equation: Equation, base: Any) -> list[Any] | None:
    if isinstance(base, Cast):
        inner = _reshaped(equation, base.base)
        return None if inner is None else [Cast(inner[0], base.new_dtype)]
    if not isinstance(base, QuantizedWeight) or equation.params["dimensions"] is not None:
        return None
    try:
        return [base.reshape(equation.params["new_sizes"])]
    except ValueError:  # it would join axes whose codes are not side by side
        return None


def _sliced(equation: Equation, base: Any) -> list[Any] | None:
    params, shape = equation.params, base.shape
    ranges = [
        slice(start, stop, stride)
        for start, stop, stride in zip(
            params["start_indices"],
            params["limit_indices"],
            params["strides"] or (1,) * len(shape),
            strict=True,
        )
    ]
    whole = [slice(0, size, 1) for size in shape]
    return _cut_in_front(base, ranges, whole, lambda leaf, front: leaf[tuple(front)])


def _dynamically_sliced(equation: Equation, base: Any, *starts: Any) -> list[Any] | None:
    sizes = equation.params["slice_sizes"]

    def cut(leaf: Array, front: Sequence[tuple[int, Any]]) -> Array:
        for axis, (size, start) in enumerate(front):
            leaf = jax.lax.dynamic_slice_in_dim(
                leaf, start, size, axis=axis, allow_negative_indices=False
            )
        return leaf

    if len(starts) != len(sizes):
        return None
    batch = batch_ndim(base)
    if tuple(sizes[batch:]) != tuple(base.shape[batch:]):
        return None
    front = list(zip(sizes, starts, strict=True))[:batch]
    return [jax.tree.map(lambda leaf: cut(leaf, front), base)]


def _cut_in_front(
    base: Any, cuts: Sequence[Any], whole: Sequence[Any], cut: Callable[[Any, Any], Array]
) -> list[Any] | None:
    """Returns a base cut along its batch axes leaf by leaf; None if another axis is cut."""
    batch = batch_ndim(base)
    if list(cuts[batch:]) != list(whole[batch:]) or not batch:
        return None
    return [jax.tree.map(lambda leaf: cut(leaf, cuts[:batch]), base)]


def _squeezed(equation: Equation, base: Any) -> list[Any] | None:
    axes = equation.params["dimensions"]
    if any(axis >= batch_ndim(base) for axis in axes):
        return None
    return [jax.tree.map(lambda leaf: leaf.squeeze(axes), base)]


def _unstacked(equation: Equation, base: Any) -> list[Any] | None:
    axis = equation.params["axis"]
    if axis >= batch_ndim(base):
        return None
    return [
        jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, place, axis, keepdims=False), base)  # noqa: B023
        for place in range(base.shape[axis])
    ]


def _split(equation: Equation, base: Any) -> list[Any] | None:
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    if axis >= batch_ndim(base):
        return None
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [
        jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, start, start + size, axis=axis), base)  # noqa: B023
        for start, size in zip(starts, sizes, strict=True)
    ]


def _picked(equation: Equation, base: Any, indices: Any) -> list[Any] | None:
    """Returns layers or experts picked by their indices, which become the batch axes.

    Where an index is out of bounds and the array would be NaN or zero, its scales and offsets are.
    """
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    batch = batch_ndim(base)
    picked = numbers.start_index_map
    if (
        not batch
        or tuple(sorted(picked)) != tuple(range(batch))
        or tuple(numbers.collapsed_slice_dims) != tuple(range(batch))
        or numbers.operand_batching_dims
        or tuple(sizes[batch:]) != tuple(base.shape[batch:])
        or not _scales_give(equation.params["fill_value"])
    ):
        return None
    places = indices.ndim - 1
    if tuple(numbers.offset_dims) != tuple(range(places, places + base.ndim - batch)):
        return None

    def pick(leaf: Array) -> Array:
        offsets = tuple(range(places, places + leaf.ndim - batch))
        params = {
            **equation.params,
            "dimension_numbers": numbers._replace(offset_dims=offsets),
            "slice_sizes": (*sizes[:batch], *leaf.shape[batch:]),
        }
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            params["mode"] = _IN_BOUNDS.get(params["mode"], params["mode"])
        return equation.primitive.bind(leaf, indices, **params)

    return [jax.tree.map(pick, base)]


def _scales_give(fill_value: Any) -> bool:
    """Says whether a weight is `fill_value` where its scales and offsets are."""
    return fill_value is None or bool(np.isnan(fill_value) or fill_value == 0)


_IN_BOUNDS = {jax.lax.GatherScatterMode.FILL_OR_DROP: jax.lax.GatherScatterMode.CLIP}


@functools.cache
def _moves() -> Mapping[Primitive, Callable[..., list[Any] | None]]:
    """Returns the ops that keep a base quantised: each gives its outputs, or None."""
    return {
        jax.lax.split_p: _split,
        jax.lax.unstack_p: _unstacked,
        primitives.convert_element_type_p: _converted,
        primitives.copy_p: _kept,
        primitives.dynamic_slice_p: _dynamically_sliced,
        primitives.gather_p: _picked,
        primitives.name_p: _kept,
        primitives.reshape_p: _reshaped,
        primitives.slice_p: _sliced,
        primitives.squeeze_p: _squeezed,
        primitives.stop_gradient_p: _kept,
        primitives.transpose_p: _transposed,
    }
