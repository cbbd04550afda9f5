"""The nodes that `wrap` puts into a parameter tree, and the algebra of their factors."""

import dataclasses
import math
import string
from collections.abc import Callable
from typing import Any, Literal, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from lora_jax._dtypes import common_dtype

_LETTERS = string.ascii_lowercase[:-1]

AxisRole = Literal["in", "out", "batch"]
Axes = tuple[AxisRole, ...]
Places = tuple[int | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAWeight:
    r"""A frozen weight with its trainable low-rank factors beside it.

    It stands for $W + s \cdot A B$, where every axis of $W$ is an input axis, an output axis or a
    batch axis: `lora_A` holds the batch axes, the input axes and the rank; `lora_B` the batch axes,
    the rank and the output axes, each in the order in which $W$ has them. For a two-axis kernel
    that is `lora_A` (in, r) and `lora_B` (r, out).

    Attributes:
      base: the frozen weight $W$.
      lora_A: $A$, of shape (\*batch, \*in, r).
      lora_B: $B$, of shape (\*batch, r, \*out).
      scale: $s$, a scalar array, so that another value swaps in without recompiling.
      axes: for each axis of `base`, its role: `"in"`, `"out"` or `"batch"`.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> weight = wrapped["kernel"]
      >>> weight.rank, weight.lora_A.shape, weight.lora_B.shape
      (2, (4, 2), (2, 3))
    """

    base: Any
    lora_A: Float[Array, "..."] | Any
    lora_B: Float[Array, "..."] | Any
    scale: Float[Array, ""] | Any
    axes: Axes = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The number of columns of `lora_A`."""
        return self.lora_A.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.base.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullWeight:
    """A weight that is trained in full beside the adapters; the model computes with `value`.

    Attributes:
      base: the frozen original, which `unwrap` gives back.
      value: the trained copy, of the same shape and dtype.
    """

    base: Any
    value: Inexact[Array, "..."] | Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.base.dtype


def is_lora_weight(node: Any) -> TypeGuard[LoRAWeight]:
    """Says whether `node` is a `LoRAWeight`."""
    return isinstance(node, LoRAWeight)


def is_adapter_node(node: Any) -> TypeGuard[LoRAWeight | FullWeight]:
    """Says whether `node` is one that `wrap` puts into a tree."""
    return isinstance(node, LoRAWeight | FullWeight)


def map_adapter_nodes(function: Callable[[Any], Any], tree: Any) -> Any:
    """Returns `tree` with `function` applied to each node that `wrap` made; the rest is kept."""
    return jax.tree.map(
        lambda node: function(node) if is_adapter_node(node) else node,
        tree,
        is_leaf=is_adapter_node,
    )


def factor_places(axes: Axes) -> tuple[Places, Places]:
    """Returns where lora_A and lora_B hold each axis of the weight, and after them the rank.

    None stands for an axis that a factor does not depend on.
    """
    batch = _positions(axes, "batch")
    A_axes = (*batch, *_positions(axes, "in"), len(axes))
    B_axes = (*batch, len(axes), *_positions(axes, "out"))

    def places(held: tuple[int, ...]) -> Places:
        return tuple(held.index(axis) if axis in held else None for axis in range(len(axes) + 1))

    return places(A_axes), places(B_axes)


def side_size(shape: tuple[int, ...], axes: Axes, role: AxisRole) -> int:
    """Returns the product of the sizes of the axes of `shape` that have `role`."""
    return math.prod(size for size, axis in zip(shape, axes, strict=True) if axis == role)


def factor_shapes(
    shape: tuple[int, ...], axes: Axes, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of `lora_A` and `lora_B` for a weight of this shape."""
    batch, inputs, outputs = (_sizes(shape, axes, role) for role in ("batch", "in", "out"))
    return (*batch, *inputs, rank), (*batch, rank, *outputs)


def to_matrices(weight: Array, axes: Axes) -> Array:
    """Returns `weight` as a stack of matrices, of shape (batch, in, out)."""
    order = _axis_order(axes)
    sides = [side_size(weight.shape, axes, role) for role in ("batch", "in", "out")]
    return weight.transpose(order).reshape(sides)


def from_matrices(matrices: Array, shape: tuple[int, ...], axes: Axes) -> Array:
    """Returns a stack of matrices (batch, in, out) as a weight of `shape`."""
    order = _axis_order(axes)
    ordered_shape = [shape[axis] for axis in order]
    inverse = [order.index(axis) for axis in range(len(order))]
    return matrices.reshape(ordered_shape).transpose(inverse)


def delta(weight: LoRAWeight) -> Array:
    """Returns scale · lora_A · lora_B in the weight's shape and the factors' dtype."""
    batch, inputs, outputs = (
        "".join(_LETTERS[axis] for axis in _positions(weight.axes, role))
        for role in ("batch", "in", "out")
    )
    product = jnp.einsum(
        f"{batch}{inputs}z,{batch}z{outputs}->{_LETTERS[: len(weight.axes)]}",
        weight.lora_A,
        weight.lora_B,
        precision=jax.lax.Precision.HIGHEST,
    )
    return weight.scale.astype(product.dtype) * product


def dense(weight: LoRAWeight) -> Array:
    """Returns W + scale · lora_A · lora_B in the weight's dtype, summed in the wider one."""
    change = delta(weight)
    wide = common_dtype(weight.dtype, change.dtype)
    return (weight.base.astype(wide) + change.astype(wide)).astype(weight.dtype)


def _axis_order(axes: Axes) -> list[int]:
    return [axis for role in ("batch", "in", "out") for axis in _positions(axes, role)]


def _positions(axes: Axes, role: str) -> tuple[int, ...]:
    return tuple(axis for axis, axis_role in enumerate(axes) if axis_role == role)


def _sizes(shape: tuple[int, ...], axes: Axes, role: str) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _positions(axes, role))
