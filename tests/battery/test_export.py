"""An op of each family exported for any number of rows, and called with several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.battery.bases import BASES
from tests.battery.layouts import LAYOUTS
from tests.battery.model import expected_results, model_of
from tests.battery.ops import OPS
from tests.battery.options import OPTIONS
from tests.battery.problems import problem_of

NAMES = (
    "negated_and_scaled",
    "rematerialised",
    "batched",
    "tied",
    "scanned_in_both_directions",
    "split",
)


@pytest.mark.parametrize("op", [op for op in OPS if op.name in NAMES], ids=lambda op: op.name)
def test_any_number_of_rows(op) -> None:
    problem = problem_of(LAYOUTS[2], OPTIONS[0], BASES[0])
    wrapped = lora_jax.combine(problem.adapters[0], problem.frozen)
    (rows,) = jax.export.symbolic_shape("rows")
    x = jnp.asarray(problem.xs[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wrapped)
    model = lora_jax.adapt(model_of(op, problem.option))
    exported = jax.export.export(jax.jit(model))(
        shapes, jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype)
    )
    results = jax.device_get(exported.call(wrapped, x))
    expected, _ = expected_results(op, problem, 0, 0)
    size = np.sqrt(sum(np.sum(np.square(y)) for y in jax.tree.leaves(expected)))
    assert_agree(results, expected, size=size)
    twice = exported.call(wrapped, jnp.concatenate([x, x]))
    assert jax.tree.structure(twice) == jax.tree.structure(results)
