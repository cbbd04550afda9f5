"""The nodes that `wrap` puts into a parameter tree."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import numpy as np
from jaxtyping import Array, Float, Inexact

from lora_jax._serialization import exportable, introduce_to_flax
from lora_jax._shapes import Axes, Layers


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAWeight:
    r"""A frozen weight with its trainable low-rank factors beside it.

    It stands for $W + s \cdot A B$, where every axis of $W$ is an input axis, an output axis or a
    batch axis: `lora_A` holds the batch axes, the input axes and the rank; `lora_B` the batch axes,
    the rank and the output axes, each in the order in which $W$ has them. For a two-axis kernel
    that is `lora_A` (in, r) and `lora_B` (r, out).

    With `magnitude` (DoRA) it stands for $m \circ (W + s A B) / \lVert W + s A B \rVert$, with one
    norm and one $m$ for each output feature.

    Attributes:
      base: the frozen weight $W$.
      lora_A: $A$, of shape (\*batch, \*in, r).
      lora_B: $B$, of shape (\*batch, r, \*out).
      scale: $s$, a scalar array, so that another value swaps in without recompiling.
      axes: for each axis of `base`, its role: `"in"`, `"out"` or `"batch"`.
      magnitude: $m$ of DoRA, of shape (\*batch, \*out), or None.
      squared_norm: $\lVert W \rVert^2$ for each output feature, computed once, where there is a
        magnitude; else None.
      initial_A: $s A_0$, where an initialiser moved $s A_0 B_0$ from the weight into the factors,
        so that `base` is the original weight without it; else None.
      initial_B: $B_0$ to it.
      layers: which places of the first batch axis are adapted; None for all. All of the above but
        `base` hold these places only.
      frozen: the names of leaves that don't train although they could, such as `"lora_A"`.
      norm: $\lVert W + s A B \rVert$ for each output feature, kept in a stack of adapters whose
        factors are fixed; else None, and it is computed where it is needed.

    In a stack of adapters `lora_A`, `lora_B`, `scale`, `magnitude` and `norm` have one more axis in
    front, and the rest is shared.

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
    norm: Float[Array, "..."] | Any = None

    def __post_init__(self) -> None:
        introduce_to_flax(type(self))

    @property
    def is_stacked(self) -> bool:
        """Whether it holds several adapters, as `stack` makes them."""
        return np.ndim(self.scale) > 0

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


@exportable
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

    def __post_init__(self) -> None:
        introduce_to_flax(type(self))

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


def without_kept_norm(node: Any) -> Any:
    """Returns the node without its norm, which belongs to the factors that it was computed of."""
    if isinstance(node, LoRAWeight) and node.norm is not None:
        return dataclasses.replace(node, norm=None)
    return node


def check_single(path: str, node: LoRAWeight) -> None:
    """Raises if a node holds several adapters."""
    if node.is_stacked:
        raise ValueError(
            f"'{path}' holds {node.scale.shape[0]} adapters; expected one. serving.adapt(fn) "
            "computes with them all, and serving.select(bank, id) gives one of them."
        )
