"""Products of labelled arrays: the numbers, and the order in which they are contracted."""

import itertools
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.transform._product import (
    Labelled,
    Labels,
    plan_product,
    product,
    without_unit_axes,
)
from tests.agreement import assert_agree

SIZES = {0: 2, 1: 3, 2: 4, 3: 5, 4: 1}

label_sets = st.lists(st.sampled_from(sorted(SIZES)), unique=True, max_size=4).map(tuple)
operand_sets = st.lists(label_sets, min_size=1, max_size=4).map(tuple)


def letters(labels: Sequence[int]) -> str:
    return "".join(chr(ord("a") + label) for label in labels)


def arrays_of(operands: Sequence[Labels]) -> list[np.ndarray]:
    generator = np.random.default_rng(len(operands))
    shapes = [[SIZES[label] for label in labels] for labels in operands]
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(operand_sets, label_sets, st.sampled_from([None, 0.5, -2.0]))
def test_the_product_is_an_einsum(
    operands: tuple[Labels, ...], output: Labels, scale: float | None
) -> None:
    arrays = arrays_of(operands)
    present = [label for label in output if any(label in labels for labels in operands)]
    subscripts = f"{','.join(letters(labels) for labels in operands)}->{letters(present)}"
    expected = (1.0 if scale is None else scale) * np.einsum(
        subscripts, *(array.astype(np.float64) for array in arrays)
    )
    actual = product(
        [Labelled(jnp.asarray(a), labels) for a, labels in zip(arrays, operands, strict=True)],
        output,
        scale=None if scale is None else jnp.asarray(scale, jnp.float32),
    )
    assert actual.labels == tuple(present)
    # What is summed, without the signs that make it cancel.
    summed = np.einsum(subscripts, *(np.abs(array) for array in arrays))
    assert_agree(actual.array, expected, size=(scale or 1.0) * summed)


def every_cost(operands: Sequence[Labels], output: set[int], sizes: Mapping[int, int]) -> list[int]:
    """Returns the operations of every order of pairwise contractions."""
    if len(operands) == 1:
        return [0]
    costs = []
    for pair in itertools.combinations(range(len(operands)), 2):
        union = set().union(*(operands[i] for i in pair))
        rest = [labels for i, labels in enumerate(operands) if i not in pair]
        kept = tuple(sorted(union & output.union(*rest)))
        step = 2 * math.prod(sizes[label] for label in union)
        costs += [step + tail for tail in every_cost([*rest, kept], output, sizes)]
    return costs


@settings(max_examples=100, deadline=None, derandomize=True)
@given(operand_sets, label_sets, st.permutations([2, 3, 5, 7, 11]))
def test_no_order_is_cheaper(
    operands: tuple[Labels, ...], output: Labels, sizes: list[int]
) -> None:
    size_of = dict(enumerate(sizes))
    plan = plan_product(operands, output, size_of)
    # Numbers are not in the plan: they scale the product.
    arrays = [labels for labels in operands if labels] or [()]
    assert plan.flops == min(every_cost(arrays, set(output), size_of))
    assert len(plan.pairs) == len(arrays) - 1


def test_the_input_meets_the_small_factor_first() -> None:
    """x (t, i), A (i, r), B (r, o): (x A) B for few rows, x (A B) for very many."""
    operands = ((0, 1), (1, 2), (2, 3))
    sizes = {0: 8, 1: 64, 2: 2, 3: 64}
    few = plan_product(operands, (0, 3), sizes)
    assert few.pairs[0] == (0, 1)
    assert few.flops == 2 * 8 * 64 * 2 + 2 * 8 * 2 * 64
    many = plan_product(operands, (0, 3), {0: 10_000, 1: 4, 2: 4, 3: 4})
    assert many.pairs[0] == (1, 2)


def test_unit_axes_are_left_out() -> None:
    found = without_unit_axes(jnp.ones((1, 3, 1, 2)), (5, 6, 7, 8))
    assert (found.array.shape, found.labels) == ((3, 2), (6, 8))
