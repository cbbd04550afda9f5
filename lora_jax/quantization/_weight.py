"""The node of a quantised weight: codes, scales, and what they dequantise to."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from lora_jax._compat import is_tracer
from lora_jax._partition import cut_as
from lora_jax._serialization import exportable, introduce_to_flax
from lora_jax._shapes import AnyArray, Size
from lora_jax.quantization._foreign import ForeignWeight
from lora_jax.quantization._formats import FORMATS, Format
from lora_jax.quantization._packing import unpacked
from lora_jax.quantization._reshape import Regrouped, completed, regrouped


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    r"""A weight as codes and scales: $w_{if} = s_{\lfloor i / b \rfloor f}\, c(q_{if}) + o_{...}$.

    The weight's axes are batch axes, which come first, blocked axes and features. The blocked axes
    are flattened to one of size n, along which b neighbours share a scale; the last block may be
    shorter. Every array below has the batch axes in front, so that a stack of quantised weights is
    cut, joined and mapped over leaf by leaf.

    It has `shape`, `dtype`, `ndim`, `size` and `sharding` like an array. It may stand anywhere in
    `params`, and be the base of a `LoRAWeight`.

    Attributes:
      codes: q, of shape (\*batch, n, \*features); a format of fewer than eight bits packs
        neighbours along n into bytes.
      scales: s, of shape (\*batch, blocks, \*features), or (\*batch, \*features, blocks) if they
        are a `QuantizedWeight` themselves.
      offsets: o, like `scales`, of one or all blocks; None without.
      codebook: c where it is not the format's own, of shape (\*batch, levels); else None.
      format: the name of the format, such as `"nf4"`.
      block: b; None for one block of all n.
      blocked: the blocked axes in the order in which they are flattened, counted from the end.
      blocked_shape: their sizes.
      features: the feature axes in the order in which `codes` has them, counted from the end.
      dtype_name: the name of the dtype that the weight dequantises to.

    Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, section 3.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = lora_jax.quantize({"kernel": jnp.ones((128, 3))}, "kernel")
      >>> weight = params["kernel"]
      >>> weight.shape, weight.codes.shape, weight.codes.dtype
      ((128, 3), (64, 3), dtype('uint8'))
      >>> float(weight.dequantize()[0, 0])
      1.0
    """

    codes: Any
    scales: Any
    offsets: Any = None
    codebook: Any = None
    format: str = dataclasses.field(default="nf4", metadata={"static": True})
    block: int | None = dataclasses.field(default=None, metadata={"static": True})
    blocked: tuple[int, ...] = dataclasses.field(default=(-2,), metadata={"static": True})
    blocked_shape: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    features: tuple[int, ...] = dataclasses.field(default=(-1,), metadata={"static": True})
    dtype_name: str = dataclasses.field(default="float32", metadata={"static": True})

    def __post_init__(self) -> None:
        introduce_to_flax(type(self))

    @property
    def batch_ndim(self) -> int:
        """The number of batch axes."""
        return len(self.codes.shape) - 1 - len(self.features)

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return self.batch_ndim + len(self.blocked) + len(self.features)

    @property
    def shape(self) -> tuple[Size, ...]:
        """The shape of the weight."""
        batch = self.batch_ndim
        sizes = dict(zip(self.blocked, self.blocked_shape, strict=True))
        sizes |= zip(self.features, self.codes.shape[batch + 1 :], strict=True)
        return (*self.codes.shape[:batch], *(sizes[axis] for axis in sorted(sizes)))

    @property
    def dtype(self) -> Any:
        """The dtype that the weight dequantises to."""
        return jnp.dtype(self.dtype_name)

    @property
    def size(self) -> Size:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of codes, scales, offsets and codebook together."""
        return sum(
            math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self)
        )

    @property
    def sharding(self) -> NamedSharding | None:
        """How the weight is cut over a mesh, as its codes are; None where that is not known."""
        is_traced = is_tracer(self.codes)
        codes = jax.typeof(self.codes) if is_traced else self.codes
        codes = getattr(codes, "sharding", None)
        if not isinstance(codes, NamedSharding) or codes.mesh.empty:
            return None
        if is_traced and AxisType.Explicit not in codes.mesh.axis_types:
            return None
        cuts = (*codes.spec, *(None,) * len(self.codes.shape))
        batch = self.batch_ndim
        by_axis = {self.blocked[0]: cuts[batch]} if self.blocked else {}
        by_axis |= zip(self.features, cuts[batch + 1 :], strict=False)
        axes = range(batch - self.ndim, 0)
        spec = PartitionSpec(*cuts[:batch], *(by_axis.get(axis) for axis in axes))
        return NamedSharding(codes.mesh, spec, memory_kind=codes.memory_kind)

    def dequantize(self) -> Array:
        """Returns the weight as an array of its `dtype`, computed in float32 and cast once."""
        return cut_as(self.sharding, _dequantized, self)

    def transpose(self, axes: Sequence[int]) -> "QuantizedWeight":
        """Returns the weight with its axes in another order; no array is touched.

        Args:
          axes: the order, as for an array; the batch axes stay in front.

        Raises:
          ValueError: a batch axis would move.
        """
        batch, ndim = self.batch_ndim, self.ndim
        if tuple(axes[:batch]) != tuple(range(batch)):
            raise ValueError(
                f"`axes` is {tuple(axes)}; expected the batch axes {tuple(range(batch))} of a "
                "quantised weight in front."
            )
        moved = {axis - ndim: place - ndim for place, axis in enumerate(axes)}
        return dataclasses.replace(
            self,
            blocked=tuple(moved[axis] for axis in self.blocked),
            features=tuple(moved[axis] for axis in self.features),
        )

    def reshape(self, shape: Sequence[int]) -> "QuantizedWeight":
        """Returns the weight with axes split and joined; no number is touched.

        Neighbours join if they are blocked axes that are flattened in this order, or features: so a
        kernel (in, heads * dim) becomes one of (in, heads, dim), and back.

        Args:
          shape: the new shape, as for an array; the batch axes stay as they are.

        Raises:
          ValueError: the weight can't have the shape, or not without other codes and scales.
        """
        batch, own = self.batch_ndim, self.shape
        new = completed(tuple(shape), math.prod(own))
        if new[:batch] != own[:batch]:
            raise ValueError(
                f"`shape` is {new}; expected the batch axes of a quantised weight in front, as "
                f"{own[:batch]}."
            )
        found = regrouped(own[batch:], new[batch:], self.blocked, self.features)
        return dataclasses.replace(
            self,
            codes=_regrouped_array(self.codes, found, batch),
            scales=_regrouped_numbers(self.scales, found, batch),
            offsets=_regrouped_numbers(self.offsets, found, batch),
            blocked=found.blocked,
            blocked_shape=found.blocked_shape,
            features=found.features,
        )

    def _order(self) -> tuple[int, ...]:
        """Returns the axes of (*batch, *blocked, *features) in the order of the weight's."""
        batch, ndim = self.batch_ndim, self.ndim
        stored = (*range(batch), *(ndim + axis for axis in (*self.blocked, *self.features)))
        return tuple(stored.index(axis) for axis in range(ndim))

    def _of_blocks(self, numbers: Any, width: int) -> Array:
        """Returns scales or offsets as (*batch, blocks or 1, 1, *features), in float32.

        Args:
          numbers: the scales or the offsets.
          width: how many weights a block has: all of its own, or one.
        """
        batch, count = self.batch_ndim, math.prod(self.blocked_shape)
        array = block_numbers(numbers, batch)
        if width == 1 and array.shape[batch] > 1:
            repeated = jnp.repeat(array, self.block or count, axis=batch)
            array = jax.lax.slice_in_dim(repeated, 0, count, axis=batch)
        return jnp.expand_dims(array, batch + 1)


def block_numbers(numbers: Any, batch: int) -> Array:
    """Returns scales or offsets as float32 of shape (*batch, blocks, *features)."""
    if not isinstance(numbers, QuantizedWeight):
        return jnp.asarray(numbers).astype(jnp.float32)
    # They are few, and are computed once rather than again for each weight of their block.
    array = jax.lax.optimization_barrier(numbers.dequantize().astype(jnp.float32))
    return jax.lax.platform_dependent(
        array,
        cpu=functools.partial(_looked_up_in_front, batch=batch),
        default=lambda array: jnp.moveaxis(array, -1, batch),
    )


def _looked_up_in_front(array: Array, batch: int) -> Array:
    """Returns an array with its last axis at `batch`, looked up rather than moved.

    XLA's compiler for CPUs drops barriers, and computes what is moved again for each of its uses.
    """
    *front, blocks = array.shape
    features = front[batch:]
    places = jnp.arange(blocks)[:, None] + blocks * jnp.arange(math.prod(features))[None, :]
    flat = array.reshape(*front[:batch], -1)
    found = flat.at[..., places].get(mode="promise_in_bounds")
    return found.reshape(*front[:batch], blocks, *features)


def _regrouped_array(array: Any, found: Regrouped, batch: int) -> Any:
    """Returns an array (*batch, n, *features) with its features regrouped."""
    order = (*range(batch + 1), *(batch + 1 + place for place in found.feature_order))
    return array.transpose(order).reshape(*array.shape[: batch + 1], *found.feature_shape)


def _regrouped_numbers(numbers: Any, found: Regrouped, batch: int) -> Any:
    """Returns scales or offsets with their features regrouped."""
    if numbers is None:
        return None
    if not isinstance(numbers, QuantizedWeight):
        # Offsets of all blocks together have no features.
        has_features = len(numbers.shape) > batch + 1
        return _regrouped_array(numbers, found, batch) if has_features else numbers
    order = (*range(batch), *(batch + place for place in found.feature_order), numbers.ndim - 1)
    moved = numbers.transpose(order)
    return moved.reshape((*moved.shape[:batch], *found.feature_shape, moved.shape[-1]))


# One program, so that even outside of jit nothing of its size is held beside the result.
@functools.partial(jax.jit, inline=True)
def _dequantized(weight: QuantizedWeight) -> Array:
    batch, count = weight.batch_ndim, math.prod(weight.blocked_shape)
    form = FORMATS[weight.format]
    codes = jnp.asarray(weight.codes)
    if form.is_packed:
        codes = unpacked(codes, form.bits, batch, count)
    front, features = codes.shape[:batch], codes.shape[batch + 1 :]
    # Where the last block is shorter, every weight is a block of its own.
    width = weight.block or count
    width = width if count % width == 0 else 1
    blocks = codes.reshape(*front, count // width, width, *features)
    if not form.is_packed:
        # Otherwise XLA flattens before it multiplies, and writes out the scale of each weight.
        blocks = jax.lax.optimization_barrier(blocks)
    scales, *offsets = (
        weight._of_blocks(each, width)
        for each in (weight.scales, weight.offsets)
        if each is not None
    )
    values = _numbers(form, blocks, weight.codebook, batch) * scales
    values = values + offsets[0] if offsets else values
    split = values.astype(weight.dtype).reshape(*front, *weight.blocked_shape, *features)
    return split.transpose(weight._order())


def _numbers(form: Format, codes: Array, codebook: Any, batch: int) -> Array:
    """Returns the number that each code stands for; a codebook may differ for each batch index."""
    if codebook is None:
        return form.numbers(codes)
    lookup = form.numbers
    for _ in range(batch):
        lookup = jax.vmap(lookup)
    return lookup(codes, jnp.asarray(codebook))


# What a tree may have as a weight: an array, its shape, or a quantised one.
AnyWeight = AnyArray | jax.ShapeDtypeStruct | QuantizedWeight | ForeignWeight


def is_quantized(leaf: Any) -> TypeGuard[QuantizedWeight | ForeignWeight]:
    """Says whether a leaf of a parameter tree is a quantised weight."""
    return isinstance(leaf, QuantizedWeight | ForeignWeight)


def format_of(leaf: Any) -> str | None:
    """Returns the format of a quantised weight, of another library's its type; None for others."""
    if isinstance(leaf, QuantizedWeight):
        return leaf.format
    return type(leaf.array).__name__ if isinstance(leaf, ForeignWeight) else None
