"""What was adapted and what it costs, as numbers and as a table."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from lora_jax._compat import is_tracer
from lora_jax._paths import leaves_with_paths
from lora_jax._tables import table
from lora_jax._train import split
from lora_jax._weight import FullWeight, LoRAWeight, is_adapter_node, side_size
from lora_jax._wrap import unwrap


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """How many numbers a wrapped tree holds.

    Attributes:
      original: those of the model that was wrapped.
      added: those of the factors.
      trainable: those that an optimiser updates: the factors and the weights trained in full.
      total: original and added together.
      trainable_bytes: the memory of the trainable ones.
      total_bytes: the memory of the original ones and the trainable ones together.
    """

    original: int
    added: int
    trainable: int
    total: int
    trainable_bytes: int
    total_bytes: int

    @property
    def percent(self) -> float:
        """The trainable numbers as a percentage of the original ones."""
        return 100 * self.trainable / self.original


def count_parameters(wrapped: Any) -> ParameterCounts:
    """Returns how many numbers `wrapped` holds, and how many of them train.

    Args:
      wrapped: what `wrap` returned.

    Returns:
      The counts.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((40, 30))}, "kernel", rank=1)
      >>> counts = lora_jax.count_parameters(wrapped)
      >>> counts.original, counts.added, counts.total
      (1200, 70, 1270)
    """
    original = _size(unwrap(wrapped))
    trainable, _ = split(wrapped)
    factors = [
        (node.lora_A, node.lora_B)
        for node in jax.tree.leaves(wrapped, is_leaf=is_adapter_node)
        if isinstance(node, LoRAWeight)
    ]
    added = _size(factors)
    return ParameterCounts(
        original=original,
        added=added,
        trainable=_size(trainable),
        total=original + added,
        trainable_bytes=_bytes(trainable),
        total_bytes=_bytes(unwrap(wrapped)) + _bytes(trainable),
    )


def summary(wrapped: Any) -> str:
    """Returns a table of what is adapted: shapes, ranks, scales, counts, percentage and bytes.

    Args:
      wrapped: what `wrap` returned.

    Returns:
      The table as text, a row for each node that `wrap` made and the totals beneath.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((40, 30))}, "kernel", rank=1, alpha=2)
      >>> print(lora_jax.summary(wrapped))
      path    shape     axes     rank  scale  dtype    trainable
      ------  --------  -------  ----  -----  -------  ---------
      kernel  (40, 30)  in, out  1     2      float32         70
      <BLANKLINE>
      1,200 original, 70 added, 1,270 together; 70 train (5.833 %): 280 B of 5.1 kB
    """
    counts = count_parameters(wrapped)
    rows = [
        _row(path, node)
        for path, node in leaves_with_paths(wrapped, is_leaf=is_adapter_node)
        if is_adapter_node(node)
    ]
    return (
        f"{table(_HEADER, rows, right=('trainable',))}\n\n"
        f"{counts.original:,} original, {counts.added:,} added, {counts.total:,} together; "
        f"{counts.trainable:,} train ({counts.percent:.3f} %): "
        f"{_readable_bytes(counts.trainable_bytes)} of {_readable_bytes(counts.total_bytes)}"
    )


_HEADER = ("path", "shape", "axes", "rank", "scale", "dtype", "trainable")


def _row(path: str, node: LoRAWeight | FullWeight) -> tuple[str, ...]:
    if isinstance(node, FullWeight):
        return (
            path,
            str(node.shape),
            "",
            "full",
            "",
            str(node.value.dtype),
            f"{_size(node.value):,}",
        )
    return (
        path,
        str(node.shape),
        ", ".join(node.axes),
        _rank_text(node),
        _scale_text(node.scale),
        str(node.lora_A.dtype),
        f"{_size((node.lora_A, node.lora_B)):,}",
    )


def _rank_text(node: LoRAWeight) -> str:
    sides = [side_size(node.shape, node.axes, role) for role in ("in", "out")]
    return f"{node.rank} (whole side)" if node.rank == min(sides) else str(node.rank)


def _scale_text(scale: Any) -> str:
    is_concrete = not is_tracer(scale) and not isinstance(scale, jax.ShapeDtypeStruct)
    return f"{float(np.asarray(scale)):g}" if is_concrete and np.ndim(scale) == 0 else "…"


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))


def _bytes(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _readable_bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
