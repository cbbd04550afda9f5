"""Products of several arrays with labelled axes, contracted in the cheapest order."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from lora_jax._dtypes import common_dtype
from lora_jax._shapes import AnyArray, Size

Labels = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Labelled:
    """An array with a label for each axis; axes of two arrays with the same label are one axis."""

    array: Array
    labels: Labels


@dataclasses.dataclass(frozen=True)
class Plan:
    """In what order to contract the operands of a product.

    Attributes:
      pairs: which two operands to contract at each step; the result is appended to what is left.
      labels: the labels of all operands and, after them, of each step's result.
      flops: the operations that all steps take together.
    """

    pairs: tuple[tuple[int, int], ...]
    labels: tuple[Labels, ...]
    flops: Size


@dataclasses.dataclass(frozen=True)
class _Order:
    """An order of contractions, whatever the sizes.

    Attributes:
      pairs: as in `Plan`.
      labels: as in `Plan`.
      steps: for each step, all labels that its two operands have.
    """

    pairs: tuple[tuple[int, int], ...]
    labels: tuple[Labels, ...]
    steps: tuple[frozenset[int], ...]

    def flops(self, size_of: Mapping[int, Size]) -> Size:
        """Returns the operations that all steps take together, for labels of these sizes."""
        return sum(2 * math.prod(size_of[label] for label in step) for step in self.steps)


def without_unit_axes(array: Array, labels: Sequence[int]) -> Labelled:
    """Returns `array` without its axes of size 1, on which it does not depend."""
    kept = [axis for axis, size in enumerate(array.shape) if size != 1]
    return Labelled(
        array.reshape([array.shape[axis] for axis in kept]), tuple(labels[axis] for axis in kept)
    )


@functools.cache
def _cheapest_order(
    operands: tuple[Labels, ...], output: frozenset[int], sizes: tuple[tuple[int, int], ...]
) -> _Order:
    """Returns the cheapest of all orders of pairwise contractions.

    Args:
      operands: the labels of each operand; there are at most four operands, so 18 orders.
      output: the labels that the product keeps.
      sizes: (label, size) of every label.
    """
    if len(operands) == 1:
        return _Order((), operands, ())
    size_of = dict(sizes)
    orders = [
        _order_from(operands, output, sizes, first, second)
        for first in range(len(operands))
        for second in range(first + 1, len(operands))
    ]
    return min(orders, key=lambda order: order.flops(size_of))


def _order_from(
    operands: tuple[Labels, ...],
    output: frozenset[int],
    sizes: tuple[tuple[int, int], ...],
    first: int,
    second: int,
) -> _Order:
    rest = tuple(labels for i, labels in enumerate(operands) if i not in (first, second))
    union = frozenset(operands[first]) | frozenset(operands[second])
    kept = union & output.union(*rest)
    result = tuple(sorted(kept))
    tail = _cheapest_order((*rest, result), output, sizes)
    return _Order(
        ((first, second), *tail.pairs),
        (*operands, result, *tail.labels[len(rest) + 1 :]),
        (union, *tail.steps),
    )


def plan_product(
    operands: Sequence[Labels], output: Sequence[int], size_of: Mapping[int, Size]
) -> Plan:
    """Returns the cheapest plan for a product of operands with these labels.

    An operand without labels is a number, which scales the product and is not in the plan. A size
    that is a symbol, such as the batch of an exported function, is taken for a large one.
    """
    arrays = tuple(labels for labels in operands if labels) or tuple(operands[:1])
    used = {label for labels in arrays for label in labels}
    sizes = tuple(sorted((label, _known_size(size_of[label])) for label in used))
    order = _cheapest_order(arrays, frozenset(output), sizes)
    return Plan(order.pairs, order.labels, order.flops(size_of))


# It only decides the order of products, between sizes with and without a symbol.
_SIZE_OF_SYMBOL = 1024


def _known_size(size: Any) -> int:
    return size if isinstance(size, int) else _SIZE_OF_SYMBOL


def product(
    operands: Sequence[Labelled],
    output: Sequence[int],
    *,
    plan: Plan | None = None,
    scale: Array | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    sharding: NamedSharding | None = None,
) -> Labelled:
    """Returns the sum over all labels that are not in `output` of the product of the operands.

    Labels of `output` that no operand has are absent from the result, which otherwise has its axes
    in the order of `output`. The scalar is multiplied onto a small array on the way.

    Args:
      operands: the arrays.
      output: the labels of the result.
      plan: how to take the product, as `plan_product` says; found here unless given.
      scale: a scalar.
      precision: that of each contraction.
      preferred_element_type: the dtype of each contraction.
      sharding: how an array with the labels of `output` is cut over explicit mesh axes, if it is.
        What a step keeps of these labels is cut so too; its other axes are not cut.
    """
    operands, scale = _without_numbers(operands, scale)
    size_of = _sizes(operands)
    if plan is None:
        plan = plan_product([operand.labels for operand in operands], output, size_of)
    scaled = None if scale is None else _best_scaled(plan.labels, len(operands), size_of)
    waiting = [
        _scaled(operand, scale) if index == scaled else operand
        for index, operand in enumerate(operands)
    ]
    for step, (first, second) in enumerate(plan.pairs):
        pair = waiting[first], waiting[second]
        waiting = [operand for i, operand in enumerate(waiting) if i not in (first, second)]
        needed = set(output).union(*(operand.labels for operand in waiting))
        result = _contract(*pair, needed, output, precision, preferred_element_type, sharding)
        if scaled == len(operands) + step:
            result = _scaled(result, scale)
        waiting.append(result)
    return _in_order(_summed(waiting[0], set(output)), output)


def _without_numbers(
    operands: Sequence[Labelled], scale: Array | None
) -> tuple[Sequence[Labelled], Array | None]:
    """Returns the operands of a plan, and a scale that has absorbed those that are numbers."""
    numbers = [operand.array for operand in operands if not operand.labels]
    if len(numbers) == len(operands):
        numbers = numbers[1:]
    if not numbers:
        return operands, scale
    factors = numbers if scale is None else [scale, *numbers]
    wide = common_dtype(*(factor.dtype for factor in factors))
    arrays = [operand for operand in operands if operand.labels] or operands[:1]
    first, *others = (factor.astype(wide) for factor in factors)
    return arrays, math.prod(others, start=first)


def _contract(
    first: Labelled,
    second: Labelled,
    needed: set[int],
    output: Sequence[int],
    precision: Any,
    preferred_element_type: Any,
    sharding: NamedSharding | None,
) -> Labelled:
    first = _summed(first, needed | set(second.labels))
    second = _summed(second, needed | set(first.labels))
    first, second = _columns_first(first, second, needed), _columns_first(second, first, needed)
    runs = _runs_to_join(first, second, needed)
    size_of = _sizes([first, second])
    first, second = _joined(first, runs), _joined(second, runs)
    output = _without_followers(tuple(output), runs)
    # `dot_general` puts the left operand's free axes first: take the order that needs no transpose.
    lhs, rhs = first, second
    if _pair_labels(second, first, needed) == tuple(x for x in output if x in needed):
        lhs, rhs = second, first
    batch, contracted = _shared(lhs, rhs, needed)
    dimensions = (
        (_axes(lhs, contracted), _axes(rhs, contracted)),
        (_axes(lhs, batch), _axes(rhs, batch)),
    )
    labels = _pair_labels(lhs, rhs, needed)
    array = jax.lax.dot_general(
        lhs.array,
        rhs.array,
        dimensions,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=None if sharding is None else _sharding_on(labels, output, sharding),
    )
    return _separated(Labelled(array, labels), runs, size_of)


# --- products whose gradients are cheap --------------------------------------------------------
#
# A skinny product, x A or h B, is bound by reading its large operand, and so is the gradient of its
# small one. How long that takes on a CPU depends on how XLA gets to see it. JAX makes the gradient
# of a factor from the cotangent, on the left, and the other operand, and transposes the result to
# the factor's axes. XLA removes the transposition by exchanging the operands.
#
#   lora_A: (dhᵀ x)ᵀ has the small operand on the left and is fast; exchanged, xᵀ dh takes 2.5 to 6
#     times as long. A barrier between product and transposition keeps XLA from it.
#   lora_B: (dyᵀ h)ᵀ becomes the fast hᵀ dy, but if dy has several axes of rows, such as examples
#     and tokens, XLA first makes a transposed copy of it: 10 times as long. With one axis of rows
#     it does not.
#
# On other platforms XLA chooses layouts itself, and a barrier is in its way. A program for a mesh
# is left alone too: it may be one for another platform, and joining axes that are cut moves them.

# So many rows for each column, and copying the columns is a small part of the product.
_ROWS_OF_COLUMN = 8


def _columns_first(factor: Labelled, rows: Labelled, needed: set[int]) -> Labelled:
    """Returns a factor of few columns that multiplies many rows behind a barrier, transposed."""
    columns = [label for label in factor.labels if label not in rows.labels]
    contracted = [label for label in factor.labels if label in rows.labels]
    if len(columns) != 1 or not contracted or needed.intersection(contracted):
        return factor
    if not is_for_cpu(factor.array, rows.array):
        return factor
    size_of = _sizes([factor, rows])
    row_count = math.prod(size_of[label] for label in rows.labels if label not in contracted)
    depth, width = math.prod(size_of[label] for label in contracted), size_of[columns[0]]
    if not _is_greater(depth, width) or not _is_greater(row_count, _ROWS_OF_COLUMN * width):
        return factor
    transposed = _in_order(factor, (*columns, *contracted))
    return Labelled(jax.lax.optimization_barrier(transposed.array), transposed.labels)


def _runs_to_join(first: Labelled, second: Labelled, needed: set[int]) -> list[Labels]:
    """Returns the runs of axes that are one axis for a product with a factor of few rows."""
    contracted = [label for label in first.labels if label in second.labels]
    if needed.intersection(contracted) or not is_for_cpu(first.array, second.array):
        return []
    size_of = _sizes([first, second])
    depth = math.prod(size_of[label] for label in contracted)
    free = [set(each.labels) - set(contracted) for each in (first, second)]
    if not all(
        _is_greater(math.prod(size_of[label] for label in labels), depth) for labels in free
    ):
        return []
    return _runs([first.labels, second.labels, _pair_labels(first, second, needed)])


def _is_greater(size: Size, other: Size) -> bool:
    """Says whether a size is greater than another, of which neither is a symbol."""
    return isinstance(size, int) and isinstance(other, int) and size > other


def _runs(sequences: Sequence[Labels]) -> list[Labels]:
    """Returns the labels that are side by side, in one order, wherever one of them is."""
    counts = collections.Counter(itertools.chain.from_iterable(sequences))
    pairs = collections.Counter(itertools.chain.from_iterable(map(itertools.pairwise, sequences)))
    following = {
        label: after
        for (label, after), count in pairs.items()
        if count == counts[label] == counts[after]
    }
    starts = [label for label in following if label not in following.values()]
    return [tuple(_chain(start, following)) for start in starts]


def _chain(label: int, following: Mapping[int, int]) -> Iterator[int]:
    yield label
    while label in following:
        label = following[label]
        yield label


def _joined(operand: Labelled, runs: Sequence[Labels]) -> Labelled:
    """Returns an operand with one axis, labelled as its first, in place of each run."""
    size_of, run_of = _sizes([operand]), {run[0]: run for run in runs}
    labels = _without_followers(operand.labels, runs)
    shape = [math.prod(size_of[each] for each in run_of.get(label, (label,))) for label in labels]
    return Labelled(operand.array.reshape(shape), labels)


def _separated(operand: Labelled, runs: Sequence[Labels], size_of: Mapping[int, Size]) -> Labelled:
    """Returns an operand with the axes of each run again."""
    run_of = {run[0]: run for run in runs}
    labels = tuple(each for label in operand.labels for each in run_of.get(label, (label,)))
    return Labelled(operand.array.reshape([size_of[label] for label in labels]), labels)


def _without_followers(labels: Labels, runs: Sequence[Labels]) -> Labels:
    """Returns labels with the first of each run alone."""
    followers = {label for run in runs for label in run[1:]}
    return tuple(label for label in labels if label not in followers)


def _sizes(operands: Sequence[Labelled]) -> dict[int, Size]:
    return {
        label: size
        for operand in operands
        for label, size in zip(operand.labels, operand.array.shape, strict=True)
    }


def is_for_cpu(*arrays: AnyArray) -> bool:
    """Says whether a product is, as far as tracing can tell, for a CPU without a mesh."""
    on_mesh = any(not jax.typeof(array).sharding.mesh.empty for array in arrays)
    return jax.default_backend() == "cpu" and not on_mesh


def sharding_of(array: Array) -> NamedSharding | None:
    """Returns how an array is cut over explicit mesh axes, or None where there are none."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _sharding_on(labels: Labels, output: Sequence[int], sharding: NamedSharding) -> NamedSharding:
    by_label = dict(zip(output, sharding.spec, strict=False))
    return NamedSharding(sharding.mesh, PartitionSpec(*(by_label.get(each) for each in labels)))


def _pair_labels(lhs: Labelled, rhs: Labelled, needed: set[int]) -> Labels:
    batch, _ = _shared(lhs, rhs, needed)
    free = [label for label in lhs.labels if label not in rhs.labels]
    return (*batch, *free, *(label for label in rhs.labels if label not in lhs.labels))


def _shared(lhs: Labelled, rhs: Labelled, needed: set[int]) -> tuple[list[int], list[int]]:
    """Returns the labels that both have: the ones needed later, and the contracted ones."""
    shared = [label for label in lhs.labels if label in rhs.labels]
    return [x for x in shared if x in needed], [x for x in shared if x not in needed]


def _axes(operand: Labelled, labels: Sequence[int]) -> list[int]:
    return [operand.labels.index(label) for label in labels]


def _summed(operand: Labelled, needed: set[int]) -> Labelled:
    alone = [axis for axis, label in enumerate(operand.labels) if label not in needed]
    if not alone:
        return operand
    labels = tuple(label for label in operand.labels if label in needed)
    return Labelled(jnp.sum(operand.array, axis=tuple(alone)), labels)


def _in_order(operand: Labelled, output: Sequence[int]) -> Labelled:
    labels = tuple(label for label in output if label in operand.labels)
    if labels == operand.labels:
        return operand
    return Labelled(operand.array.transpose(_axes(operand, labels)), labels)


def _scaled(operand: Labelled, scale: Array | None) -> Labelled:
    assert scale is not None
    return Labelled(operand.array * scale.astype(operand.array.dtype), operand.labels)


def _best_scaled(labels: Sequence[Labels], operand_count: int, size_of: Mapping[int, Size]) -> int:
    """Returns which array takes the scale: the smallest result, or a much smaller operand.

    A scaled operand is scaled again in the backward pass, and a scaled result is not; so a result
    may be twice as large.
    """
    counts = [
        math.prod(_known_size(size_of[label]) for label in array_labels) for array_labels in labels
    ]
    smallest = min(counts)
    best_result = min(counts[operand_count:], default=smallest)
    if best_result <= 2 * smallest:
        return counts.index(best_result, min(operand_count, len(counts) - 1))
    return counts.index(smallest)
