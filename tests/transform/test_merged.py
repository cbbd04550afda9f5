"""Products with W + AB, built in each direction, that have the gradients of the factors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.transform._building import cheapest
from tests.agreement import assert_agree
from tests.arrays import random

ROWS, INPUTS, OUTPUTS, RANK = 256, 24, 20, 2


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["W"])


def wrapped(**options: Any) -> Any:
    params = {"W": random(INPUTS, OUTPUTS, seed=1)}
    tree = lora_jax.wrap(params, "W", rank=RANK, **options)
    trained = dataclasses.replace(tree["W"], lora_B=random(RANK, OUTPUTS, seed=2))
    return {"W": trained}


def how(tree: Any, x: Any, fn: Any = model) -> set[str]:
    report = lora_jax.explain(fn, tree, x)
    return {use.how for target in report.targets for use in target.uses}


X = random(ROWS, INPUTS, seed=0)


def loss(apply: Any, adapters: Any, frozen: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(apply(lora_jax.combine(adapters, frozen), x)))


def by_merging(tree: Any, x: jax.Array) -> jax.Array:
    return model(lora_jax.merge(tree), x)


def test_where_rows_outnumber_what_building_costs() -> None:
    assert how(wrapped(), X) == {"merged"}
    assert how(wrapped(), X[:16]) == {"factored"}


@pytest.mark.parametrize(
    ("flops", "expected"),
    [
        # F, f, b: three of f, two of f and b, or F and three of b.
        ((100, 10, 5), "factored"),
        ((100, 10, 4), "merged"),
        ((10, 10, 4), "dense"),
    ],
)
def test_the_cheapest_way(flops: Any, expected: str) -> None:
    assert cheapest(["factored", "merged", "dense"], *flops) == expected
    assert cheapest(["factored"], *flops) == "factored"


def test_a_half_precision_weight_with_wider_factors_stays_factored() -> None:
    """W + AB would be rounded to the weight's dtype, which loses small changes."""
    params = {"W": random(INPUTS, OUTPUTS, seed=1).astype(jnp.bfloat16)}
    tree = lora_jax.wrap(params, "W", rank=RANK, dtype=jnp.float32)
    assert how(tree, X.astype(jnp.bfloat16)) == {"factored"}


def test_rows_that_are_a_constant_of_the_model() -> None:
    constant = np.asarray(X)

    def fixed(params: Any) -> jax.Array:
        return jnp.tanh(jax.lax.dot(constant, params["W"]))

    report = lora_jax.explain(fixed, wrapped())
    assert {use.how for target in report.targets for use in target.uses} == {"merged"}
    assert_agree(lora_jax.adapt(fixed)(wrapped()), by_merging(wrapped(), X))


def test_dropout_keeps_the_weight_factored() -> None:
    tree = wrapped()
    adapted = lora_jax.adapt(model, dropout=0.5)
    masked = adapted(tree, X, lora_key=jax.random.key(0))
    assert not np.allclose(masked, adapted(tree, X))


DERIVATIVES = {
    "forward": jax.jacfwd,
    "reverse": jax.jacrev,
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(lambda a: jnp.sum(f(a) ** 2))),
    "reverse over forward": lambda f: jax.jacrev(
        lambda a: jax.jvp(lambda a: jnp.sum(f(a) ** 2), (a,), (jax.tree.map(jnp.ones_like, a),))[1]
    ),
    "rematerialised": lambda f: jax.jacrev(jax.checkpoint(f)),
}


@pytest.mark.parametrize("argument", ["adapters", "x"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_are_those_of_the_dense_weight(name: str, argument: str) -> None:
    adapters, frozen = lora_jax.split(wrapped())
    rows = jnp.concatenate([X, X])[:ROWS]

    def results(apply: Any) -> Any:
        def of(moving: Any) -> jax.Array:
            halves = (moving, frozen) if argument == "adapters" else (adapters, frozen)
            x = rows if argument == "adapters" else jnp.tile(moving, (64, 1))
            return jnp.mean(apply(lora_jax.combine(*halves), x), axis=0)

        moving = adapters if argument == "adapters" else X[:4]
        return jax.jit(DERIVATIVES[name](of))(moving)

    assert how(wrapped(), rows) == {"merged"}
    assert_agree(results(lora_jax.adapt(model)), results(by_merging), tolerance=2e-5)


def compiled_gradients(apply: Any, tree: Any, x: Any, *, with_inputs: bool = True) -> Any:
    adapters, frozen = lora_jax.split(tree)
    places = (0, 1) if with_inputs else 0

    def of(adapters: Any, x: Any, frozen: Any) -> Any:
        return loss(apply, adapters, frozen, x)

    return jax.jit(jax.grad(of, argnums=places)).lower(adapters, x, frozen).compile()


@pytest.mark.usefixtures("optimised")
def test_the_gradient_of_the_weight_is_never_made() -> None:
    """A step takes fewer operations than with factors, and far fewer than with a dense weight."""

    def by_hand(tree: Any, x: jax.Array) -> jax.Array:
        node = tree["W"]
        return jnp.tanh(x @ node.base + node.scale * (x @ node.lora_A) @ node.lora_B)

    flops = [
        compiled_gradients(apply, wrapped(), X).cost_analysis()["flops"]
        for apply in (lora_jax.adapt(model), by_hand, by_merging)
    ]
    assert flops[0] < flops[1] < flops[2]


@pytest.mark.usefixtures("optimised")
def test_layers_do_not_keep_their_built_weights() -> None:
    """The memory of a scan over layers grows with their activations alone."""
    size, rows = 64, 256

    def scanned(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, W: (jnp.tanh(h @ W), None), x, params["W"])[0]

    def temporary(layers: int) -> int:
        params = {"W": random(layers, size, size)}
        tree = lora_jax.wrap(params, "W", rank=RANK, axes={"W": ("batch", "in", "out")})
        assert how(tree, random(rows, size), scanned) == {"merged"}
        compiled = compiled_gradients(lora_jax.adapt(scanned), tree, random(rows, size))
        return int(compiled.memory_analysis().temp_size_in_bytes)

    activations, weight = 4 * rows * size, 4 * size * size
    grown = (temporary(12) - temporary(4)) / 8
    # Of each layer its input, tanh(h W) and the slope of tanh stay.
    assert grown < 3 * activations + weight / 2


@pytest.mark.usefixtures("optimised")
def test_rows_of_several_axes_cost_what_one_axis_does() -> None:
    """Examples and tokens: no transposed copy of activations is made for the factors' gradients."""
    rows = random(2048, 64)
    tree = lora_jax.wrap({"W": random(64, 96)}, "W", rank=RANK)
    accessed = [
        compiled_gradients(lora_jax.adapt(model), tree, x).cost_analysis()["bytes accessed"]
        for x in (rows, rows.reshape(8, 256, 64))
    ]
    assert accessed[1] <= 1.02 * accessed[0]
