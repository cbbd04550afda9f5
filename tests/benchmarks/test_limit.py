"""The steps that `benchmarks.limit` compares, on small blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.limit import ADAPT, BY_HAND, LIMIT, SCALE, compiled_steps, main, steps_of
from benchmarks.llama_blocks import SMALL
from tests.agreement import assert_agree
from tests.arrays import random

SIZES = dataclasses.replace(SMALL, layers=2, embed=96, hidden=256, heads=3, kv_heads=1, length=64)


@pytest.mark.usefixtures("promoted_ranks")
def test_both_steps_compute_the_same():
    steps = steps_of(SIZES, 4, jnp.float32)
    results = {}
    for name in (BY_HAND, ADAPT):
        step, shapes = steps[name]
        arrays = jax.tree.map(array, shapes)
        results[name] = jax.jit(step)(*arrays)
    assert_agree(*results.values(), tolerance=1e-4)


@pytest.mark.usefixtures("optimised", "promoted_ranks")
@pytest.mark.parametrize("rank", [4, 16])
def test_a_step_costs_less_than_one_written_by_hand(rank):
    steps = {name: step for name, (step, _) in compiled_steps(SIZES, rank, jnp.float32).items()}
    flops, accessed, temporary = (
        {name: of(step) for name, step in steps.items()}
        for of in (
            lambda step: step.cost_analysis()["flops"],
            lambda step: step.cost_analysis()["bytes accessed"],
            lambda step: step.memory_analysis().temp_size_in_bytes,
        )
    )
    assert flops[LIMIT] < flops[ADAPT] < flops[BY_HAND]
    assert accessed[LIMIT] < accessed[ADAPT] < accessed[BY_HAND]
    assert temporary[ADAPT] <= 1.05 * temporary[BY_HAND]


def array(leaf):
    """Returns an array of a shape; a number is the scale that is written into steps by hand."""
    if not leaf.shape:
        return jnp.float32(SCALE)
    return random(*leaf.shape) / max(leaf.shape) ** 0.5


def test_wrong_arguments(capsys):
    assert main(["--rank", "0"]) == 2
    assert "--rank" in capsys.readouterr().err


def test_shapes_are_those_of_the_blocks():
    _, (adapters, x, frozen) = steps_of(SIZES, 4, jnp.float32)[ADAPT]
    assert adapters["down"].lora_A.shape == (2, 256, 4)
    assert frozen["key"].base.shape == (2, 96, 32)
    assert np.prod(x.shape[:2]) == SIZES.examples * SIZES.length
