"""`explain`: where each weight is used, how, how often, and what it costs."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax

X = jnp.ones((3, 40))


def wrapped(shapes: dict[str, tuple[int, ...]], rank: int = 2, **options: Any) -> Any:
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    return lora_jax.wrap(params, ".*", rank=rank, **options)


SQUARE = wrapped({"W": (40, 40)})


@pytest.mark.parametrize(("rows", "rank"), [(3, 2), (1, 1), (7, 4)])
def test_the_cost_of_a_dense_layer(rows: int, rank: int) -> None:
    report = lora_jax.explain(
        lambda p, x: x @ p["W"], wrapped({"W": (40, 30)}, rank), jnp.ones((rows, 40))
    )
    (target,) = report.targets
    (use,) = target.uses
    assert (target.path, target.shape, target.rank) == ("W", (40, 30), rank)
    assert target.axes == ("in", "out")
    assert (use.primitive, use.how, use.times) == ("dot_general", "factored", 1)
    assert use.base_flops == 2 * rows * 40 * 30
    assert use.added_flops == report.added_flops == 2 * rows * rank * (40 + 30)
    assert use.dense_flops == (2 * rank + 1) * 40 * 30
    assert "test_explain.py" in use.source


@jax.jit
def _layer(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ kernel)


def repeated(layer: Any, times: int) -> Any:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        for _ in range(times):
            x = layer(params["W"], x)
        return x

    return fn


def scanned(layer: Any, times: int) -> Any:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (layer(params["W"], h), None), x, None, length=times)[0]

    return fn


@pytest.mark.parametrize(
    ("fn", "times"),
    [
        (repeated(_layer, 1), 1),
        (repeated(_layer, 2), 2),
        (scanned(_layer, 5), 5),
        (scanned(lambda w, x: _layer(w, _layer(w, x)), 3), 6),
        (lambda p, x: scanned(_layer, 3)(p, repeated(_layer, 2)(p, x)), 5),
        (jax.jit(repeated(_layer, 2)), 2),
        (repeated(jax.checkpoint(lambda w, x: jnp.tanh(x @ w)), 2), 2),
        (
            lambda p, x: jax.lax.scan(
                lambda h, _: (scanned(_layer, 2)(p, h), None), x, None, length=3
            )[0],
            6,
        ),
    ],
    ids=["once", "twice", "scan", "twice in scan", "both", "in jit", "remat", "scan in scan"],
)
def test_how_often(fn: Any, times: int) -> None:
    report = lora_jax.explain(fn, SQUARE, X)
    assert sum(use.times for use in report.targets[0].uses) == times
    assert report.added_flops == times * 2 * 3 * 2 * 80


def test_a_weight_that_is_never_used_is_named() -> None:
    tree = wrapped({"W": (40, 40), "idle": (8, 8)})
    report = lora_jax.explain(lambda p, x: x @ p["W"], tree, X)
    assert report.unused == ("idle",)
    assert "'idle' is never used: its adapter does nothing." in str(report)
    assert "nowhere" in str(report)
    assert lora_jax.explain(lambda p, x: x @ p["W"], SQUARE, X).unused == ()


def test_one_of_two_trees_is_never_used() -> None:
    """Paths alone don't tell two arguments apart, and an idle adapter must not be silent."""
    report = lora_jax.explain(lambda actor, critic, x: x @ actor["W"], SQUARE, SQUARE, X)
    assert len(report.unused) == 1
    assert report.added_flops == 2 * 3 * 2 * 80


def test_what_no_rule_covers() -> None:
    report = lora_jax.explain(lambda p, x: x @ jnp.sin(p["W"]), SQUARE, X)
    (use,) = report.materialized
    assert (use.path, use.primitive, use.how) == ("W", "sin", "materialized")
    assert use.added_flops == use.dense_flops == 5 * 1600
    assert "materialized" in str(report)


def test_building_the_weight_where_that_is_cheaper() -> None:
    tree = wrapped({"W": (4, 3)})
    (use,) = lora_jax.explain(lambda p, x: x @ p["W"], tree, jnp.ones((50, 4))).targets[0].uses
    assert (use.how, use.added_flops) == ("dense", 5 * 12)
    assert lora_jax.explain(lambda p, x: x @ p["W"], tree, jnp.ones((50, 4))).materialized == ()


def test_every_use_of_a_joined_weight_names_both() -> None:
    tree = wrapped({"Q": (40, 20), "K": (40, 20)})
    report = lora_jax.explain(lambda p, x: x @ jnp.concatenate([p["Q"], p["K"]], axis=1), tree, X)
    assert report.unused == ()


def test_the_cost_of_a_joined_weight_counts_once() -> None:
    tree = wrapped({"Q": (40, 20), "K": (40, 20)})
    report = lora_jax.explain(lambda p, x: x @ jnp.concatenate([p["Q"], p["K"]], axis=1), tree, X)
    assert report.added_flops == 2 * (2 * 3 * 2 * (40 + 20))


@pytest.mark.parametrize("abstract", [False, True])
def test_nothing_is_computed(abstract: bool) -> None:
    calls = []

    def fn(params: Any, x: jax.Array, *, train: bool) -> jax.Array:
        assert train
        jax.debug.callback(lambda: calls.append(1))
        return x @ params["W"]

    tree, x = (jax.eval_shape(lambda: (SQUARE, X))) if abstract else (SQUARE, X)
    assert lora_jax.explain(fn, tree, x, train=True).added_flops == 2 * 3 * 2 * 80
    jax.effects_barrier()
    assert not calls


def test_wrapped_keyword_arguments() -> None:
    report = lora_jax.explain(lambda x, params: x @ params["W"], X, params=SQUARE)
    assert [target.path for target in report.targets] == ["W"]
    assert report.unused == ()


def test_no_adapters_no_rows() -> None:
    report = lora_jax.explain(lambda p, x: x @ p["W"], {"W": jnp.ones((40, 40))}, X)
    assert report.targets == ()
    assert report.added_flops == 0
    assert "path" in str(report)
