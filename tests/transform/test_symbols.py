"""Programs for many shapes: `jax.export` with a batch whose size is a symbol."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.trained import as_if_trained

RNG = np.random.default_rng(6)
KEY = jax.random.key(0)

PARAMS = {
    "W": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32),
    "V": jnp.asarray(RNG.normal(size=(3, 6, 6)) / 3, jnp.float32),
    "K": jnp.asarray(RNG.normal(size=(3, 3, 2, 4)) / 3, jnp.float32),
}
AXES = {"V": ("batch", "in", "out"), "K": ("in", "in", "in", "out")}

FUNCTIONS: dict[str, tuple[Callable[..., jax.Array], tuple[int, ...]]] = {
    "a product": (lambda p, x: x @ p["W"], (6,)),
    "products of weights": (lambda p, x: x @ (p["V"][0] @ p["V"][1]), (6,)),
    "a loop": (lambda p, x: jax.lax.scan(lambda h, k: (h @ k, None), x, p["V"])[0], (6,)),
    "a lookup": (lambda p, x: p["W"][jnp.abs(x[:, 0] * 5).astype(int) % 6], (6,)),
    "a convolution": (
        lambda p, x: jax.lax.conv_general_dilated(
            x, p["K"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (5, 5, 2),
    ),
    "a layer": (lambda p, x: jax.jit(jnp.tanh)(jax.checkpoint(jnp.sin)(x) @ p["W"]), (6,)),
}


def trained(**options: Any) -> Any:
    return as_if_trained(lora_jax.wrap(PARAMS, ".*", rank=2, axes=AXES, **options))


TREES = {"lora": trained(), "dora": trained(dora=True)}


@pytest.mark.filterwarnings("ignore::lora_jax.MaterializationWarning")
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_program_for_every_batch(name: str, tree: str) -> None:
    fn, shape = FUNCTIONS[name]
    leaves, structure = jax.tree.flatten(TREES[tree])
    adapted = lora_jax.adapt(fn)
    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(
        jax.jit(lambda leaves, x: adapted(jax.tree.unflatten(structure, leaves), x))
    )(leaves, jax.ShapeDtypeStruct((batch, *shape), jnp.float32))
    for size in (1, 7):
        x = jnp.asarray(RNG.normal(size=(size, *shape)), jnp.float32)
        assert_agree(exported.call(leaves, x), fn(lora_jax.merge(TREES[tree]), x))


OF_TWO_SYMBOLS: dict[str, Callable[..., jax.Array]] = {
    "a scan of a symbolic length": lambda p, x: jax.lax.map(lambda t: t @ p["W"], x),
    "a weight that is repeated": lambda p, x: jnp.broadcast_to(
        p["V"][0], (*x.shape[:2], 6, 6)
    ).reshape(-1, 6, 6)[0],
    "a part of one that is repeated": lambda p, x: jnp.broadcast_to(p["W"], (x.shape[0], 6, 4))[
        :, 1
    ],
}


@pytest.mark.filterwarnings("ignore::lora_jax.MaterializationWarning")
@pytest.mark.parametrize("name", OF_TWO_SYMBOLS)
def test_sizes_that_are_symbols(name: str) -> None:
    fn, adapted = OF_TWO_SYMBOLS[name], lora_jax.adapt(OF_TWO_SYMBOLS[name])
    leaves, structure = jax.tree.flatten(TREES["lora"])
    sizes = jax.export.symbolic_shape("s, b")
    exported = jax.export.export(
        jax.jit(lambda leaves, x: adapted(jax.tree.unflatten(structure, leaves), x))
    )(leaves, jax.ShapeDtypeStruct((*sizes, 6), jnp.float32))
    x = jnp.asarray(RNG.normal(size=(3, 2, 6)), jnp.float32)
    assert_agree(exported.call(leaves, x), fn(lora_jax.merge(TREES["lora"]), x))


def test_costs_that_are_symbols_are_shown() -> None:
    (batch,) = jax.export.symbolic_shape("b")
    tree = lora_jax.wrap({"W": PARAMS["W"]}, "W", rank=2)
    report = lora_jax.explain(
        lambda p, x: x @ p["W"], tree, jax.ShapeDtypeStruct((batch, 6), jnp.float32)
    )
    assert "40*b" in str(report)


def test_dropout_for_every_batch() -> None:
    adapted = lora_jax.adapt(FUNCTIONS["a product"][0], dropout=0.5)
    (batch,) = jax.export.symbolic_shape("b")
    leaves, structure = jax.tree.flatten(TREES["lora"])
    exported = jax.export.export(
        jax.jit(
            lambda leaves, x, key: adapted(jax.tree.unflatten(structure, leaves), x, lora_key=key)
        )
    )(leaves, jax.ShapeDtypeStruct((batch, 6), jnp.float32), KEY)
    x = jnp.asarray(RNG.normal(size=(5, 6)), jnp.float32)
    assert_agree(exported.call(leaves, x, KEY), adapted(TREES["lora"], x, lora_key=KEY))


def test_where_the_cheaper_way_depends_on_the_batch_it_is_factored() -> None:
    def how(batch: Any) -> set[str]:
        x = jax.ShapeDtypeStruct((batch, 6), jnp.float32)
        tree = lora_jax.wrap({"W": PARAMS["W"]}, "W", rank=2)
        report = lora_jax.explain(lambda p, x: x @ p["W"], tree, x)
        return {use.how for target in report.targets for use in target.uses}

    (batch,) = jax.export.symbolic_shape("b")
    assert (how(2), how(1000), how(batch)) == ({"factored"}, {"dense"}, {"factored"})
