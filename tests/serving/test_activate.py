"""`activate`: the exact sum of several adapters, with weights that may be traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.serving.models import BATCH, DENSE, MODELS, Model, dense, merged, one_by_one

WEIGHTS = [1.0, 0.0, -0.5]


def summed(model: Model, wrappeds: list[Any], weights: Any) -> dict[str, np.ndarray]:
    """Returns the params plus the weighted changes, in float64."""
    weights_of_each = [dense(wrapped) for wrapped in wrappeds]
    return {
        name: leaf
        + sum(
            weight * (each[name] - leaf)
            for weight, each in zip(weights, weights_of_each, strict=True)
        )
        for name, leaf in dense(model.params).items()
    }


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_sum_is_exact(model: Model) -> None:
    wrappeds = [model.adapter(seed, rank=seed + 1, alpha=2.0) for seed in range(3)]
    bank = lora_jax.serving.bank(wrappeds)
    active = lora_jax.serving.activate(bank, WEIGHTS)
    expected = summed(model, wrappeds, WEIGHTS)
    for name, leaf in merged(active).items():
        assert_agree(leaf, expected[name])
    reference = one_by_one(model, [expected] * BATCH, model.x)
    actual = jax.jit(lora_jax.adapt(model.fn, on_materialize="error"))(active, model.x)
    assert_agree(actual, reference)


def test_switching_compiles_nothing_again() -> None:
    traces = []

    @jax.jit
    def apply(bank: Any, weights: jax.Array, x: jax.Array) -> jax.Array:
        traces.append(1)
        return lora_jax.adapt(DENSE.fn)(lora_jax.serving.activate(bank, weights), x)

    wrappeds = [DENSE.adapter(seed) for seed in range(3)]
    bank = lora_jax.serving.bank(wrappeds)
    for weights in np.eye(3, dtype=np.float32):
        expected = DENSE.fn(lora_jax.merge(wrappeds[int(weights.argmax())]), DENSE.x)
        assert_agree(apply(bank, weights, DENSE.x), expected)
    off = apply(bank, np.zeros(3, np.float32), DENSE.x)
    assert_agree(off, DENSE.fn(DENSE.params, DENSE.x))
    assert len(traces) == 1
    faded = jax.jit(lambda share: lora_jax.serving.activate(bank, [share, 1 - share, 0.0]))
    assert_agree(
        faded(0.25)["W1"].lora_B, lora_jax.serving.activate(bank, [0.25, 0.75, 0.0])["W1"].lora_B
    )


def test_each_example_with_its_own_sum() -> None:
    wrappeds = [DENSE.adapter(seed) for seed in range(2)]
    bank = lora_jax.serving.bank(wrappeds)
    weights = np.random.default_rng(0).normal(size=(len(DENSE.x), 2)).astype(np.float32)

    def one(weights: jax.Array, x: jax.Array) -> jax.Array:
        return lora_jax.adapt(DENSE.fn)(lora_jax.serving.activate(bank, weights), x)

    actual = jax.jit(jax.vmap(one))(weights, DENSE.x)
    for place, x in enumerate(DENSE.x):
        merged = jax.tree.map(
            lambda leaf: leaf.astype(np.float32), summed(DENSE, wrappeds, weights[place].tolist())
        )
        assert_agree(actual[place], DENSE.fn(merged, x), tolerance=1e-4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"`weights` has the shape \(1,\); expected a number for each of the 2"),
        ([1.0, float("nan")], "`weights` is .*; expected finite numbers"),
    ],
)
def test_weights_that_do_not_fit(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_jax.serving.activate(lora_jax.serving.bank([DENSE.adapter(0)] * 2), weights)


def test_whole_numbers_are_weights() -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0)])
    assert_agree(
        lora_jax.merge(lora_jax.serving.activate(bank, jnp.array([1])))["W1"],
        lora_jax.merge(DENSE.adapter(0))["W1"],
    )


def test_magnitudes_do_not_add_up() -> None:
    with pytest.raises(ValueError, match=r"`bank` has a magnitude \(DoRA\) at 'W1'.*extract"):
        lora_jax.serving.activate(lora_jax.serving.bank([DENSE.adapter(0, dora=True)]), [1.0])
    with pytest.raises(ValueError, match="`bank` is not a bank"):
        lora_jax.serving.activate(DENSE.adapter(0), [1.0])
