"""What is adapted and what it costs, as numbers and as a table."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lora_jax._compat import is_tracer
from lora_jax._nodes import NodeIndex
from lora_jax._row_selection import rows_text, selects_rows
from lora_jax._shapes import largest_rank
from lora_jax._tables import table
from lora_jax._train import split
from lora_jax._weight import (
    AdapterNode,
    FullWeight,
    LoRABank,
    LoRAWeight,
    changes_base,
    has_factors,
    innermost_base,
    is_adapter_node,
)
from lora_jax.quantization._weight import format_of, is_quantized


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """The parameter counts of a wrapped tree.

    Attributes:
      original: the parameters of the model that was wrapped; a quantised weight counts as the
        weights that it stands for, and with the bytes of its codes and scales.
      added: the arrays beside the weights: factors, magnitudes, and what is stored with them.
      trainable: what an optimiser updates: added parameters that are not frozen, and weights
        trained in full.
      total: original and added together.
      trainable_bytes: the memory of the trainable parameters.
      total_bytes: the memory of all parameters, copies of weights trained in full included.
    """

    original: int
    added: int
    trainable: int
    total: int
    trainable_bytes: int
    total_bytes: int

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of the original ones; 0 if there are none."""
        return 100 * self.trainable / self.original if self.original else 0.0


def count_parameters(wrapped: Any) -> ParameterCounts:
    """Returns how many parameters `wrapped` holds, and how many of them train.

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
    index = NodeIndex.of(wrapped)
    bases = index.mapped(lambda _, node: innermost_base(node))
    original = _size(bases)
    trainable, _ = split(wrapped)
    added = [_added(node) for node in index.nodes.values() if has_factors(node)]
    copies = [node.value for node in index.nodes.values() if isinstance(node, FullWeight)]
    return ParameterCounts(
        original=original,
        added=_size(added),
        trainable=_size(trainable),
        total=original + _size(added),
        trainable_bytes=_bytes(trainable),
        total_bytes=_bytes((bases, added, copies)),
    )


def summary(wrapped: Any) -> str:
    """Returns a table of what is adapted: shapes, ranks, scales, counts, percentage and bytes.

    Args:
      wrapped: what `wrap` returned.

    Returns:
      The table as text: a row for each node that `wrap` made, and the totals below.

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
    rows = [row for path, node in NodeIndex.of(wrapped).nodes.items() for row in _rows(path, node)]
    header, rows = _without_empty_notes(rows)
    return (
        f"{table(header, rows, right=('trainable',))}\n\n"
        f"{counts.original:,} original, {counts.added:,} added, {counts.total:,} together; "
        f"{counts.trainable:,} train ({counts.percent:.3f} %): "
        f"{_readable_bytes(counts.trainable_bytes)} of {_readable_bytes(counts.total_bytes)}"
    )


_HEADER = ("path", "shape", "axes", "rank", "scale", "notes", "dtype", "trainable")


def _without_empty_notes(
    rows: Sequence[tuple[str, ...]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the header and the rows, without the column of notes if it is empty."""
    notes = _HEADER.index("notes")
    if any(row[notes] for row in rows):
        return _HEADER, list(rows)
    without = [(*row[:notes], *row[notes + 1 :]) for row in (_HEADER, *rows)]
    return without[0], without[1:]


def _notes(node: LoRAWeight | LoRABank) -> str:
    """Returns what distinguishes a weight from plain LoRA."""
    notes = []
    base = innermost_base(node)
    if is_quantized(base) and not is_adapter_node(node.base):
        notes.append(f"{format_of(base)}, {8 * _bytes(base) / math.prod(base.shape):.2f} bits")
    if node.magnitude is not None:
        notes.append("DoRA")
    if isinstance(node, LoRABank):
        notes.append(f"{node.capacity} slots")
    elif changes_base(node):
        notes.append("base changed")
    if node.layers is not None:
        notes.append(f"layers {_ranges(node.layers)}")
    frozen = [name for name in node.frozen if name != "lora_A" or not selects_rows(node)]
    if frozen:
        notes.append(f"{' and '.join(frozen)} frozen")
    return ", ".join(notes)


def _ranges(numbers: Sequence[int]) -> str:
    """Returns sorted whole numbers as ranges: 0, 4-7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _added(node: LoRAWeight | LoRABank) -> Any:
    """Returns the arrays beside a weight, except scales."""
    inner = _added(node.base) if has_factors(node.base) else None
    return dataclasses.replace(node, base=inner, scale=None)


def _rows(path: str, node: AdapterNode) -> list[tuple[str, ...]]:
    """Returns a row for a node, after the rows of the nodes below it in its base."""
    inner = _rows(f"{path}/base", node.base) if has_factors(node.base) else []
    return [*inner, _row(path, node)]


def _row(path: str, node: AdapterNode) -> tuple[str, ...]:
    if isinstance(node, FullWeight):
        return (
            path,
            str(node.shape),
            "",
            "full",
            "",
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
        _notes(node),
        str(node.lora_B.dtype),
        f"{_size(split(dataclasses.replace(node, base=None))[0]):,}",
    )


def _rank_text(node: LoRAWeight | LoRABank) -> str:
    if selects_rows(node):
        return rows_text(node.rank)
    is_whole = node.rank == largest_rank(node.shape, node.axes)
    return f"{node.rank} (whole side)" if is_whole else str(node.rank)


def _scale_text(scale: Any) -> str:
    is_concrete = not is_tracer(scale) and not isinstance(scale, jax.ShapeDtypeStruct)
    return f"{float(np.asarray(scale)):g}" if is_concrete and np.ndim(scale) == 0 else "…"


def _size(tree: Any) -> int:
    leaves = jax.tree.leaves(tree, is_leaf=is_quantized)
    return sum(math.prod(leaf.shape) for leaf in leaves if hasattr(leaf, "shape"))


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
