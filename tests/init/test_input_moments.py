"""`input_moments` against sums over inputs that are computed by hand, in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.arrays import random

KEY = jax.random.key(4)


def assert_moments(
    actual: lora_jax.init.InputMoments, rows: np.ndarray, counts: list[int] | None = None
) -> None:
    """Compares with the moments of rows (batch, n, in)."""
    rows = np.asarray(rows, np.float64)
    second = np.einsum("bni,bnj->bij", rows, rows)
    assert_agree(actual.second, second)
    assert_agree(actual.first, rows.sum(1), size=rows)
    assert actual.count.tolist() == (counts or [rows.shape[1]] * rows.shape[0])


def patches(x: jax.Array, size: int) -> np.ndarray:
    """Returns the (height · width · channels) patches of images, with zeros around."""
    pad = size // 2
    padded = np.pad(np.asarray(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return np.stack(
        [
            padded[n, i : i + size, j : j + size].ravel()
            for n in range(x.shape[0])
            for i in range(x.shape[1])
            for j in range(x.shape[2])
        ]
    )


def convolved(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


X = random(6, 5)
IMAGES = random(2, 4, 3, 4)
GROUPED = np.asarray(IMAGES).reshape(2, 4, 3, 2, 2)

SINGLE: dict[str, tuple[Callable[..., Any], Any, tuple[str, ...], Any, np.ndarray]] = {
    "dense": (lambda W, x: jnp.tanh(x @ W), random(5, 4), ("in", "out"), X, X[None]),
    "left": (lambda W, x: W @ x.T, random(4, 5), ("out", "in"), X, X[None]),
    "query": (
        lambda W, x: jnp.einsum("te,ehd->thd", x, W),
        random(5, 2, 3),
        ("in", "out", "out"),
        X,
        X[None],
    ),
    "two input axes": (
        lambda W, x: jnp.einsum("thd,hde->te", x, W),
        random(2, 3, 4),
        ("in", "in", "out"),
        random(7, 2, 3),
        random(7, 2, 3).reshape(1, 7, 6),
    ),
    "experts": (
        lambda W, x: jnp.einsum("eti,eio->eto", x, W),
        random(3, 5, 4),
        ("batch", "in", "out"),
        random(3, 6, 5),
        random(3, 6, 5),
    ),
    "used twice": (
        lambda W, x: (x @ W, (2 * x) @ W),
        random(5, 4),
        ("in", "out"),
        X,
        jnp.concatenate([X, 2 * X])[None],
    ),
    "convolution": (
        lambda W, x: convolved(x, W),
        random(3, 3, 4, 2),
        ("in", "in", "in", "out"),
        IMAGES,
        patches(IMAGES, 3)[None],
    ),
    "grouped convolution": (
        lambda W, x: convolved(x, W, feature_group_count=2),
        random(3, 3, 2, 6),
        ("in", "in", "in", "out"),
        IMAGES,
        np.concatenate([patches(GROUPED[..., g, :], 3) for g in (0, 1)])[None],
    ),
    "scan": (
        lambda W, x: jax.lax.scan(lambda c, w: (c @ w, None), x, W)[0],
        jnp.stack([jnp.eye(5), 2 * jnp.eye(5), jnp.eye(5)]),
        ("batch", "in", "out"),
        X,
        jnp.stack([X, X, 2 * X]),
    ),
    "remat of jit in scan": (
        lambda W, x: jax.lax.scan(
            jax.checkpoint(lambda c, w: (jax.jit(lambda c: c @ w)(c), None)), x, W
        )[0],
        jnp.stack([jnp.eye(5), 2 * jnp.eye(5)]),
        ("batch", "in", "out"),
        X,
        jnp.stack([X, X]),
    ),
    "tied": (
        lambda W, x: (x @ W) @ W.T,
        random(5, 4),
        ("in", "out"),
        X,
        X[None],
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_the_moments_are_sums_over_the_inputs(name: str) -> None:
    fn, weight, axes, x, rows = SINGLE[name]
    moments = lora_jax.init.input_moments(
        lambda params, x: fn(params["W"], x), {"W": weight}, [x], targets="W", axes={"W": axes}
    )
    assert_moments(moments["W"], rows)


def test_batches_add_up() -> None:
    def fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = batch
        return jnp.mean((x @ params["W"] - y) ** 2)

    batches = [(random(n, 5, seed=n), random(n, 4)) for n in (3, 8, 1)]
    moments = lora_jax.init.input_moments(fn, {"W": random(5, 4)}, iter(batches), targets="W")
    assert_moments(moments["W"], np.concatenate([x for x, _ in batches])[None])


def test_a_ragged_product_counts_each_experts_rows() -> None:
    x, sizes = random(6, 5), jnp.array([2, 0, 4])
    moments = lora_jax.init.input_moments(
        lambda params, x: jax.lax.ragged_dot(x, params["W"], sizes),
        {"W": random(3, 5, 4)},
        [x],
        targets="W",
        axes={"W": ("batch", "in", "out")},
    )["W"]
    rows = np.zeros((3, 4, 5))
    rows[0, :2], rows[2, :4] = x[:2], x[2:]
    assert_moments(moments, rows, [2, 0, 4])


def test_a_function_with_a_derivative_rule_of_its_own() -> None:
    @jax.custom_vjp
    def layer(W: jax.Array, x: jax.Array) -> jax.Array:
        return x @ W

    layer.defvjp(lambda W, x: (x @ W, None), lambda saved, cotangent: (None, None))
    moments = lora_jax.init.input_moments(
        lambda params, x: layer(params["W"], x), {"W": random(5, 4)}, [X], targets="W"
    )
    assert_moments(moments["W"], X[None])


def test_the_model_runs_as_it_is() -> None:
    """A later layer sees what it would see without probes, also where a weight must be built."""
    params = {"first": random(5, 4), "second": random(4, 3)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return (x @ jnp.sin(params["first"]) + x @ params["first"]) @ params["second"]

    moments = lora_jax.init.input_moments(fn, params, [X], targets=".*")
    assert_moments(moments["first"], X[None])
    assert_moments(moments["second"], (X @ (jnp.sin(params["first"]) + params["first"]))[None])


A, B = random(5, 4, seed=21), random(5, 4, seed=22)
SQUARE_A, SQUARE_B = random(5, 5, seed=23), random(5, 5, seed=24)

JOINED: dict[str, tuple[Callable[..., Any], Any, dict[str, Any]]] = {
    "outputs": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1),
        {"a": A, "b": B},
        {"a": X, "b": X},
    ),
    "inputs": (
        lambda p, x: jnp.concatenate([x, 2 * x], 1) @ jnp.concatenate([p["a"], p["b"]]),
        {"a": A, "b": B},
        {"a": X, "b": 2 * X},
    ),
    "stack in a scan": (
        lambda p, x: jax.lax.scan(
            lambda c, w: (jnp.tanh(c @ w), None), x, jnp.stack([p["a"], p["b"]])
        )[0],
        {"a": SQUARE_A, "b": SQUARE_B},
        {"a": X, "b": jnp.tanh(X @ SQUARE_A)},
    ),
    "stack in one product": (
        lambda p, x: jnp.einsum("bi,kio->kbo", x, jnp.stack([p["a"], p["b"]])),
        {"a": A, "b": B},
        {"a": X, "b": X},
    ),
    "scaled along the outputs": (
        lambda p, x: (x @ (p["a"] * jnp.arange(1.0, 5.0)[None]), x @ (p["b"] / jnp.ones((1, 4)))),
        {"a": A, "b": B},
        {"a": X, "b": X},
    ),
    "scaled along the inputs": (
        lambda p, x: (x @ (p["a"] * jnp.arange(1.0, 6.0)[:, None]), x @ p["b"]),
        {"a": A, "b": B},
        {"a": X * jnp.arange(1.0, 6.0)[None], "b": X},
    ),
}


@pytest.mark.parametrize("name", JOINED)
def test_each_of_several_weights_has_its_own_inputs(name: str) -> None:
    fn, params, rows = JOINED[name]
    moments = lora_jax.init.input_moments(fn, params, [X], targets="a|b")
    for path in params:
        assert_moments(moments[path], np.asarray(rows[path])[None])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_are_in_float32_whatever_the_model_computes_in(dtype: Any) -> None:
    x = (10 * random(900, 5)).astype(dtype)
    moments = lora_jax.init.input_moments(
        lambda p, x: x @ p["W"].astype(dtype), {"W": random(5, 4)}, [x], targets="W"
    )["W"]
    rows = np.asarray(x, np.float64)
    assert_agree(moments.second[0], rows.T @ rows)
    assert_agree(moments.first[0], rows.sum(0), size=rows)
    assert moments.count.tolist() == [900]


def test_a_convolution_in_bfloat16() -> None:
    images = IMAGES.astype(jnp.bfloat16)
    moments = lora_jax.init.input_moments(
        lambda p, x: convolved(x, p["W"].astype(jnp.bfloat16)),
        {"W": random(3, 3, 4, 2)},
        [images],
        targets="W",
        axes={"W": ("in", "in", "in", "out")},
    )
    assert_moments(moments["W"], patches(images.astype(jnp.float32), 3)[None])


@pytest.mark.parametrize(
    ("fn", "batches", "message"),
    [
        (lambda params, ids: params["W"][ids], [jnp.array([1, 2])], "`targets` selects 'W'"),
        (lambda params, x: jax.lax.stop_gradient(x @ params["W"]), [X], "`targets` selects 'W'"),
        (lambda params, x: x @ params["W"], [], "`batches` is empty"),
    ],
)
def test_refuses(fn: Callable[..., Any], batches: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_jax.init.input_moments(fn, {"W": random(5, 4)}, batches, targets="W")
