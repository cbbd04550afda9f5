"""The nodes that `wrap` and `serving.bank` put into a parameter tree."""

import dataclasses
from typing import Any, TypeGuard

import jax
from jaxtyping import Array, Float, Inexact, Int

from lora_jax._serialization import exportable, introduce_to_flax
from lora_jax._shapes import Axes, Layers
from lora_jax.quantization._weight import is_quantized

# The leaves of a node that train unless frozen.
FACTORS = ("lora_A", "lora_B", "magnitude")


class _Node:
    """What holds for every node: it has the shape and the dtype of its base."""

    base: Any

    def __post_init__(self) -> None:
        introduce_to_flax(type(self))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.base.dtype


class _NodeWithFactors(_Node):
    """A node with low-rank factors."""

    lora_A: Any

    @property
    def rank(self) -> int:
        """The number of columns of `lora_A`."""
        return self.lora_A.shape[-1]


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAWeight(_NodeWithFactors):
    r"""A frozen weight with its trainable low-rank factors beside it.

    It represents $W + s \cdot A B$, where every axis of $W$ is an input axis, an output axis or a
    batch axis: `lora_A` holds the batch axes, the input axes and the rank; `lora_B` the batch axes,
    the rank and the output axes, each in the order in which $W$ has them. For a two-axis kernel
    that is `lora_A` (in, r) and `lora_B` (r, out). Where the adapter changes single rows, `lora_A`
    is a `RowSelection`, which says which ones, and `lora_B` holds a row for each of them.

    With `magnitude` (DoRA) it represents $m \circ (W + s A B) / \lVert W + s A B \rVert$, with one
    norm and one $m$ for each output feature.

    Attributes:
      base: the frozen weight $W$: an array, or another `LoRAWeight`, so that a weight can have
        several adapters on top of each other.
      lora_A: $A$, of shape (\*batch, \*in, r), or a `RowSelection`.
      lora_B: $B$, of shape (\*batch, r, \*out).
      scale: $s$, a scalar array, so that its value can change without recompiling.
      axes: for each axis of `base`, its role: `"in"`, `"out"` or `"batch"`.
      magnitude: $m$ of DoRA, of shape (\*batch, \*out), or None.
      squared_norm: $\lVert W \rVert^2$ for each output feature, computed once; None without a
        magnitude.
      initial_A: $s A_0$, where an initialiser moved $s A_0 B_0$ from the weight into the factors,
        so that `base` is the original weight minus that product; else None.
      initial_B: the $B_0$ of that product; else None.
      layers: which indices of the first batch axis are adapted; None for all. All arrays above
        except `base` hold these layers only.
      frozen: the names of the factors and magnitudes that don't train, such as `"lora_A"`.
      encoding: where an initialiser quantised the base, its format, its block, and whether its
        scales are quantised too; else None.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1; Liu et
    al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, equation 5.

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
    magnitude: Float[Array, "..."] | Any = None
    squared_norm: Float[Array, "..."] | Any = None
    initial_A: Float[Array, "..."] | Any = None
    initial_B: Float[Array, "..."] | Any = None
    layers: Layers | None = dataclasses.field(default=None, metadata={"static": True})
    frozen: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    encoding: tuple[Any, ...] | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotWeight(LoRAWeight):
    r"""A weight with what one slot of a bank holds, which may be read from the bank again.

    Attributes:
      norm: $\lVert W + s A B \rVert$ for each output feature, where the bank caches it; else None.
      bank_A: `lora_A` of the bank.
      bank_B: `lora_B` of the bank.
      slot: the slot, out of bounds for an adapter that changes nothing.
    """

    norm: Float[Array, "..."] | Any = None
    bank_A: Float[Array, "..."] | Any = None
    bank_B: Float[Array, "..."] | Any = None
    slot: Int[Array, ""] | Any = None


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRABank(_NodeWithFactors):
    r"""A frozen weight with several adapters beside it, each in a slot of its own.

    Slot i represents $W + s_i \cdot A_i B_i$, or with magnitudes (DoRA)
    $m_i \circ (W + s_i A_i B_i) / \lVert W + s_i A_i B_i \rVert$. An empty slot, whose factors are
    all zero, represents $W$. `lora_jax.serving` makes banks and computes with them.

    Attributes:
      base: the frozen weight $W$, which all adapters share.
      lora_A: $A_i$ of each adapter, of shape (slot, \*batch, \*in, r).
      lora_B: $B_i$, of shape (slot, \*batch, r, \*out).
      scale: $s_i$, of shape (slot,).
      axes: for each axis of `base`, its role: `"in"`, `"out"` or `"batch"`.
      magnitude: $m_i$ of DoRA, of shape (slot, \*batch, \*out), or None.
      squared_norm: $\lVert W \rVert^2$ for each output feature; None without magnitudes.
      norm: $\lVert W + s_i A_i B_i \rVert$ for each output feature, cached while the factors are
        fixed; None without magnitudes, and in a bank that trains.
      layers: which indices of the first batch axis are adapted; None for all.
      frozen: the names of the factors and magnitudes that don't train.

    Source: Sheng et al., S-LoRA: Serving Thousands of Concurrent LoRA Adapters, 2023.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> bank = lora_jax.serving.bank([wrapped], capacity=8)["kernel"]
      >>> bank.capacity, bank.lora_A.shape
      (8, (8, 4, 2))
    """

    base: Any
    lora_A: Float[Array, "..."] | Any
    lora_B: Float[Array, "..."] | Any
    scale: Float[Array, " slot"] | Any
    axes: Axes = dataclasses.field(metadata={"static": True})
    magnitude: Float[Array, "..."] | Any = None
    squared_norm: Float[Array, "..."] | Any = None
    norm: Float[Array, "..."] | Any = None
    layers: Layers | None = dataclasses.field(default=None, metadata={"static": True})
    frozen: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.scale.shape[0]


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullWeight(_Node):
    """A weight that trains in full beside the adapters; the model computes with `value`.

    Attributes:
      base: the frozen original, which `unwrap` returns.
      value: the trained copy, of the same shape and dtype.
    """

    base: Any
    value: Inexact[Array, "..."] | Any


AdapterNode = LoRAWeight | LoRABank | FullWeight


def is_lora_weight(node: Any) -> TypeGuard[LoRAWeight]:
    """Says whether `node` is a weight with one adapter."""
    return isinstance(node, LoRAWeight)


def is_bank(node: Any) -> TypeGuard[LoRABank]:
    """Says whether `node` is a weight with a bank of adapters."""
    return isinstance(node, LoRABank)


def has_factors(node: Any) -> TypeGuard[LoRAWeight | LoRABank]:
    """Says whether `node` is a weight with one adapter or several."""
    return isinstance(node, LoRAWeight | LoRABank)


def changes_base(node: Any) -> bool:
    """Says whether an initialiser made the base of a node from the weight that was wrapped."""
    return is_lora_weight(node) and (node.initial_A is not None or node.encoding is not None)


def is_adapter_node(node: Any) -> TypeGuard[AdapterNode]:
    """Says whether `node` is one that `wrap` or `serving.bank` puts into a tree."""
    return isinstance(node, LoRAWeight | LoRABank | FullWeight)


def is_weight(leaf: Any) -> bool:
    """Says whether a leaf is a weight that a model meets as an array: adapted or quantised."""
    return has_factors(leaf) or is_quantized(leaf)


def is_node(leaf: Any) -> bool:
    """Says whether a leaf of a tree has arrays of its own: made by `wrap` or by `quantize`."""
    return is_adapter_node(leaf) or is_quantized(leaf)


def innermost_base(node: Any) -> Any:
    """Returns what is at the bottom of a node, whose base may be a node: the frozen weight."""
    while is_adapter_node(node):
        node = node.base
    return node
