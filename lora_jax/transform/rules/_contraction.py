"""What terms of a weight add to a contraction with it: products of its factors and the rest.

Adapted or not, an operand's axes are named by labels, the same ones for axes that are contracted or
mapped over together.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import Equation
from lora_jax._dtypes import common_dtype
from lora_jax._shapes import AnyArray, Size
from lora_jax.transform._bases import array_of
from lora_jax.transform._factored import Factored, terms_of
from lora_jax.transform._interpreter import Interpreter
from lora_jax.transform._product import (
    Labelled,
    Labels,
    Plan,
    plan_product,
    product,
    sharding_of,
    without_unit_axes,
)
from lora_jax.transform._terms import Term, Window, block_shape, without_windows


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A `dot_general` whose operands' axes have labels.

    Attributes:
      interpreter: at the equation.
      equation: the equation.
      labels: the labels of each operand.
      output: the labels of the result, in its order.
    """

    interpreter: Interpreter
    equation: Equation
    labels: tuple[Labels, Labels]
    output: Labels

    @classmethod
    def of(
        cls, interpreter: Interpreter, equation: Equation, inputs: Sequence[Any]
    ) -> "Contraction":
        """Returns an equation with labels for the axes of its inputs."""
        (lhs_summed, rhs_summed), (lhs_batch, rhs_batch) = equation.params["dimension_numbers"]
        lhs = tuple(range(inputs[0].ndim))
        paired = dict(zip((*rhs_summed, *rhs_batch), (*lhs_summed, *lhs_batch), strict=True))
        rhs = tuple(paired.get(axis, len(lhs) + axis) for axis in range(inputs[1].ndim))
        lhs_free = [axis for axis in lhs if axis not in (*lhs_summed, *lhs_batch)]
        rhs_free = [label for label in rhs if label >= len(lhs)]
        return cls(interpreter, equation, (lhs, rhs), (*lhs_batch, *lhs_free, *rhs_free))

    def rank_label(self, position: int) -> int:
        """Returns a label for the rank of an operand's factors that no axis has."""
        return 1 + position + max((each for named in self.labels for each in named), default=0)

    def sizes(self, operands: Sequence[Any]) -> dict[int, Size]:
        """Returns the size of each label."""
        return {
            label: size
            for value, named in zip(operands, self.labels, strict=True)
            for label, size in zip(named, value.shape, strict=True)
        }

    def flops(self, operands: Sequence[Any]) -> Size:
        """Returns the FLOPs of the contraction itself."""
        return 2 * math.prod(self.sizes(operands).values())

    def plans(self, position: int, operands: Sequence[Any]) -> list[Plan]:
        """Returns, for each term of an operand, how to multiply it with the other's base."""
        return [self._plan(term, position, operands) for term in terms_of(operands[position])]

    def change(
        self,
        use: int,
        operands: Sequence[Any],
        summand: Sequence[tuple[Term, Plan] | None],
        result: Array,
    ) -> Array:
        """Returns one summand of the product, in the shape and dtype of `result`.

        Args:
          use: tells apart the masks of the summands.
          operands: the operands as they are computed with.
          summand: for each operand the term that stands for it, with its plan, or None for the
            base.
          result: the product of the bases.
        """
        terms = [None if part is None else part[0] for part in summand]
        plans = [part[1] for part in summand if part is not None]
        if len(plans) > 1:
            terms = [
                None if term is None else without_windows(term, operand.shape)
                for term, operand in zip(terms, operands, strict=True)
            ]
        ranges = _ranges(terms, self.labels)
        dropout = self.interpreter.dropout
        arrays: list[tuple[Array, Labels]] = []
        for position, (operand, term) in enumerate(zip(operands, terms, strict=True)):
            labels = self.labels[position]
            if term is None:
                array = _sliced(array_of(operand), labels, ranges)
                if not isinstance(operand, Factored):
                    array = dropout.dropped_out(array, use)
                arrays.append((array, labels))
            else:
                named = (*labels, self.rank_label(position))
                arrays += [(term.lora_A, named), (term.lora_B, named)]
        dtype = common_dtype(*(array.dtype for array, _ in arrays))
        scales = [term.scale for term in terms if term is not None]
        if any(not isinstance(operand, Factored) for operand in operands):
            scales[0] = dropout.scaled(scales[0])
        count = self._constant_count(operands, ranges, arrays)
        if count != 1:
            scales.append(jnp.asarray(count, scales[0].dtype))
        joined = product(
            [without_unit_axes(array.astype(dtype), named) for array, named in arrays],
            self.output,
            plan=plans[0] if len(plans) == 1 else None,
            scale=math.prod(scales[1:], start=scales[0]),
            precision=self.equation.params["precision"],
            preferred_element_type=product_dtype(self.equation, dtype),
            sharding=sharding_of(result),
        )
        return _placed(joined, self.output, ranges, result)

    def _plan(self, term: Term, position: int, operands: Sequence[Any]) -> Plan:
        shape = block_shape(term, operands[position].shape)
        block = dict(zip(self.labels[position], shape, strict=True))
        rank_label = self.rank_label(position)
        size_of = {**self.sizes(operands), **block, rank_label: term.rank}
        held: list[Labels] = []
        for own, named in enumerate(self.labels):
            if own != position:
                held.append(tuple(label for label in named if size_of[label] != 1))
                continue
            for factor in (term.lora_A, term.lora_B):
                pairs = zip((*named, rank_label), factor.shape, strict=True)
                held.append(tuple(label for label, size in pairs if size != 1))
        return plan_product(held, self.output, size_of)

    def _constant_count(
        self,
        operands: Sequence[Any],
        ranges: Mapping[int, Window],
        arrays: Sequence[tuple[Array, Labels]],
    ) -> int:
        """Returns how many equal products a summand sums, along axes that none of its arrays has.

        A factor has size 1 on an axis that it does not depend on. Where both weights were broadcast
        along an axis that the product sums over, no array tells its size.
        """
        size_of = {
            **self.sizes(operands),
            **{label: stop - start for label, (start, stop) in ranges.items()},
        }
        held = {
            label
            for array, named in arrays
            for label, size in zip(named, array.shape, strict=True)
            if size != 1
        }
        return math.prod(
            size
            for label, size in size_of.items()
            if label not in held and label not in self.output
        )


def _placed(joined: Labelled, output: Labels, ranges: dict[int, Window], result: Array) -> Array:
    """Returns a product broadcast and padded to the shape of `result`, and cast to its dtype."""
    absent = [axis for axis, label in enumerate(output) if label not in joined.labels]
    array = jnp.expand_dims(joined.array, absent).astype(result.dtype)
    windows = [
        ranges.get(label, (0, size)) for label, size in zip(output, result.shape, strict=True)
    ]
    array = jnp.broadcast_to(array, [stop - start for start, stop in windows])
    if array.shape == result.shape:
        return array
    padding = [(lo, size - hi) for (lo, hi), size in zip(windows, result.shape, strict=True)]
    return jnp.pad(array, padding)


def product_dtype(equation: Equation, dtype: Any) -> Any:
    """Returns the dtype in which products accumulate: the model's, or the factors' if wider."""
    wanted = equation.params["preferred_element_type"]
    return dtype if wanted is None else common_dtype(dtype, wanted)


def _sliced(array: AnyArray, labels: Labels, ranges: dict[int, Window]) -> Array:
    for axis, label in enumerate(labels):
        if label in ranges:
            array = jax.lax.slice_in_dim(array, *ranges[label], axis=axis)
    return jnp.asarray(array)


def _ranges(terms: Sequence[Term | None], labels: Sequence[Labels]) -> dict[int, Window]:
    """Returns, for each label that a term's window restricts, the range that it allows."""
    return {
        label: window
        for term, named in zip(terms, labels, strict=True)
        if term is not None
        for label, window in zip(named, term.window, strict=True)
        if window is not None
    }
