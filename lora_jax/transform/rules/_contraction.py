"""What terms of a weight add to a contraction with it: products of its factors and the rest.

Adapted or not, an operand's axes are named by labels, the same ones for axes that are contracted or
mapped over together.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
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
from lora_jax.transform._terms import (
    Rows,
    Term,
    Window,
    Windows,
    block_shape,
    without_windows,
)


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

    def windows(self, terms: Sequence[Term | None]) -> Windows:
        """Returns the windows of the result outside of which a summand of the product is zero.

        Args:
          terms: for each operand the term that stands for it, or None for the base.
        """
        by_label = _windows_of_labels(terms, self.labels) if _count(terms) == 1 else {}
        return tuple(by_label.get(label) for label in self.output)

    def block(
        self,
        use: int,
        operands: Sequence[Any],
        summand: Sequence[tuple[Term, Plan] | None],
        result: Array,
    ) -> Array:
        """Returns one summand of the product within its windows, in the dtype of `result`.

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
        windows = _windows_of_labels(terms, self.labels)
        dropout = self.interpreter.dropout
        arrays: list[tuple[Array, Labels]] = []
        for position, (operand, term) in enumerate(zip(operands, terms, strict=True)):
            labels = self.labels[position]
            if term is None:
                array = _taken(array_of(operand), labels, windows)
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
        count = self._constant_count(operands, windows, arrays)
        if count != 1:
            scales.append(jnp.asarray(count, scales[0].dtype))
        joined = product(
            [without_unit_axes(array.astype(dtype), named) for array, named in arrays],
            self.output,
            plan=plans[0] if len(plans) == 1 else None,
            scale=math.prod(scales[1:], start=scales[0]),
            precision=self.equation.params["precision"],
            preferred_element_type=product_dtype(self.equation, dtype),
            sharding=self._block_sharding(windows, result),
        )
        return self._whole_block(joined, windows, result)

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
        windows: Mapping[int, Window],
        arrays: Sequence[tuple[Array, Labels]],
    ) -> int:
        """Returns how many equal products a summand sums, along axes that none of its arrays has.

        A factor has size 1 on an axis that it does not depend on. Where both weights were broadcast
        along an axis that the product sums over, no array tells its size.
        """
        size_of = {
            **self.sizes(operands),
            **{label: window.width for label, window in windows.items()},
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

    def _block_sharding(self, windows: Mapping[int, Window], result: Array) -> NamedSharding | None:
        """Returns how a block is cut over explicit mesh axes: as the result, and not along rows."""
        sharding = sharding_of(result)
        if sharding is None:
            return None
        cuts = zip(self.output, sharding.spec, strict=False)
        spec = [None if isinstance(windows.get(label), Rows) else cut for label, cut in cuts]
        return NamedSharding(sharding.mesh, PartitionSpec(*spec))

    def _whole_block(self, joined: Labelled, windows: Mapping[int, Window], result: Array) -> Array:
        """Returns a product broadcast to the windows of `result`, and cast to its dtype."""
        absent = [axis for axis, label in enumerate(self.output) if label not in joined.labels]
        shape = [
            windows[label].width if label in windows else size
            for label, size in zip(self.output, result.shape, strict=True)
        ]
        block = jnp.expand_dims(joined.array, absent).astype(result.dtype)
        return jnp.broadcast_to(block, shape)


def product_dtype(equation: Equation, dtype: Any) -> Any:
    """Returns the dtype in which products accumulate: the model's, or the factors' if wider."""
    wanted = equation.params["preferred_element_type"]
    return dtype if wanted is None else common_dtype(dtype, wanted)


def _taken(array: AnyArray, labels: Labels, windows: Mapping[int, Window]) -> Array:
    """Returns the part of an operand that meets what is in the windows."""
    array = jnp.asarray(array)
    for axis, label in enumerate(labels):
        if label in windows:
            array = windows[label].taken(array, axis)
    return array


def _windows_of_labels(terms: Sequence[Term | None], labels: Sequence[Labels]) -> dict[int, Window]:
    """Returns, for each label that a term's window restricts, that window."""
    return {
        label: window
        for term, named in zip(terms, labels, strict=True)
        if term is not None
        for label, window in zip(named, term.window, strict=True)
        if window is not None
    }


def _count(terms: Sequence[Term | None]) -> int:
    return sum(term is not None for term in terms)
