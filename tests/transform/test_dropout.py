"""LoRA dropout: on the adapter's input only, keyed, with a mask of its own for each use."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax
from tests.agreement import assert_agree
from tests.arrays import random
from tests.trained import as_if_trained

KEY = jax.random.key(8)


def trained(shapes: dict[str, tuple[int, ...]], rank: int = 2, **options: Any) -> Any:
    params = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    wrapped = lora_jax.wrap(params, ".*", rank=rank, **options)
    return as_if_trained(wrapped)


SQUARE = trained({"W": (24, 24)})
X = random(5, 24, seed=20)


@jax.jit
def _inner(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return x @ kernel


def in_a_loop(params: Any, x: jax.Array) -> jax.Array:
    def step(state: Any) -> Any:
        count, results = state
        return count + 1, results.at[count].set(x @ params["W"])

    initial = 0, jnp.zeros((2, *x.shape))
    return jax.lax.while_loop(lambda state: state[0] < 2, step, initial)[1]


def in_branches(params: Any, x: jax.Array) -> jax.Array:
    def either() -> jax.Array:
        return jax.lax.cond(x[0, 0] > -9, lambda w: x @ w, lambda w: x @ w.T, params["W"])

    return jnp.stack([either(), either()])


def under_remat(params: Any, x: jax.Array) -> jax.Array:
    layer = jax.checkpoint(lambda w, x: x @ w)
    return jnp.stack([layer(params["W"], x), layer(params["W"], x)])


# Functions that use the same weight on the same input twice, and return both results.
TWICE: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "directly": lambda p, x: jnp.stack([x @ p["W"], x @ p["W"]]),
    "one jitted function": lambda p, x: jnp.stack([_inner(p["W"], x), _inner(p["W"], x)]),
    "scan": lambda p, x: jax.lax.scan(lambda c, _: (c, x @ p["W"]), 0, None, length=2)[1],
    "map": lambda p, x: jax.lax.map(lambda h: h @ p["W"], jnp.stack([x, x])),
    "while": in_a_loop,
    "cond": in_branches,
    "remat": under_remat,
    "convolution": lambda p, x: jnp.stack(
        [
            jax.lax.conv_general_dilated(
                x[None], p["W"][None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )[0]
            for _ in range(2)
        ]
    ),
    "lookup": lambda p, x: jnp.stack([p["W"][jnp.arange(5)], p["W"][jnp.arange(5)]]),
}


@pytest.fixture(params=TWICE.values(), ids=TWICE)
def twice(request: pytest.FixtureRequest) -> Callable[[Any, jax.Array], jax.Array]:
    return request.param


def test_off_without_a_key(twice: Callable[[Any, jax.Array], jax.Array]) -> None:
    expected = lora_jax.adapt(twice)(SQUARE, X)
    np.testing.assert_array_equal(lora_jax.adapt(twice, dropout=0.5)(SQUARE, X), expected)


def test_each_use_has_a_mask_of_its_own(twice: Callable[[Any, jax.Array], jax.Array]) -> None:
    adapted = lora_jax.adapt(twice, dropout=0.5)
    first, second = np.asarray(adapted(SQUARE, X, lora_key=KEY))
    assert np.abs(first - second).max() > 1e-2
    off = np.asarray(adapted(SQUARE, X))[0]
    assert np.abs(first - off).max() > 1e-2


def test_the_mask_is_a_function_of_the_key(twice: Callable[[Any, jax.Array], jax.Array]) -> None:
    adapted = jax.jit(lora_jax.adapt(twice, dropout=0.5))
    first, again = (adapted(SQUARE, X, lora_key=KEY) for _ in range(2))
    other = adapted(SQUARE, X, lora_key=jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first) - np.asarray(other)).max() > 1e-2


def test_the_base_path_is_untouched(twice: Callable[[Any, jax.Array], jax.Array]) -> None:
    fresh = lora_jax.wrap(lora_jax.unwrap(SQUARE), "W", rank=2)
    actual = lora_jax.adapt(twice, dropout=0.9)(fresh, X, lora_key=KEY)
    assert_agree(actual, twice(lora_jax.unwrap(SQUARE), X))


@pytest.mark.parametrize("name", ["directly", "scan", "convolution", "lookup"])
def test_the_expectation_is_the_output_without_dropout(name: str) -> None:
    adapted = lora_jax.adapt(TWICE[name], dropout=0.3)
    keys = jax.random.split(KEY, 600)
    outputs = jax.jit(jax.vmap(lambda key: adapted(SQUARE, X, lora_key=key)))(keys)
    expected, base = adapted(SQUARE, X), TWICE[name](lora_jax.unwrap(SQUARE), X)
    error = np.linalg.norm(outputs.mean(0) - expected) / np.linalg.norm(expected - base)
    # A single output misses by about √(0.3 / 0.7) = 0.65, the mean of 600 by 0.027.
    assert error < 0.06
    single = np.linalg.norm(outputs[0] - expected) / np.linalg.norm(expected - base)
    assert single > 0.3


def test_layers_of_a_stack_have_masks_of_their_own() -> None:
    node = SQUARE["W"]
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), node)
    stack = lora_jax.LoRAWeight(
        stack.base, stack.lora_A, stack.lora_B, node.scale, ("batch", "in", "out")
    )

    def layers(stack: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, w: (c, x @ w), 0, stack)[1]

    first, second = lora_jax.adapt(layers, dropout=0.5)(stack, X, lora_key=KEY)
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-2


@pytest.mark.parametrize("axes", [("in", "out"), ("out", "in")])
def test_each_lookup_is_dropped_on_its_own(axes: tuple[str, str]) -> None:
    weight = trained({"W": (7, 50)}, axes={"W": axes})
    rows = lora_jax.adapt(lambda p, i: p["W"][i], dropout=0.5)(
        weight, jnp.zeros(50, int), lora_key=jax.random.key(0)
    )
    assert len(np.unique(np.asarray(rows).round(5), axis=0)) == 2


def test_nothing_of_a_trace_outlives_it() -> None:
    layer = jax.jit(lambda h, kernel: jnp.tanh(h @ kernel))
    stack = trained({"V": (3, 6, 6)}, axes={"V": ("batch", "in", "out")})
    adapted = lora_jax.adapt(
        lambda p, x: jax.lax.scan(lambda h, k: (layer(h, k), None), x, p["V"])[0], dropout=0.5
    )
    with jax.checking_leaks():
        jax.jit(lambda w: adapted(w, jnp.ones((2, 6)), lora_key=jax.random.key(0)))(stack)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_an_input_that_is_cut(axis_type: Any) -> None:
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)
    whole = NamedSharding(mesh, PartitionSpec())
    weight = jax.device_put(trained({"W": (6, 6)}), whole)
    adapted = lora_jax.adapt(lambda p, x: x @ p["W"], dropout=0.5)
    key, x = jax.random.key(0), jnp.ones((8, 6))
    with jax.set_mesh(mesh):
        cut = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d", "m")))
        actual = adapted(weight, cut, lora_key=key)
        assert_agree(actual, adapted(weight, jax.device_put(x, whole), lora_key=key))


def test_devices_with_the_same_input_draw_the_same_mask() -> None:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec

    def fn(params: Any, x: jax.Array) -> Any:
        same, own = jax.shard_map(
            lambda w, x, y: (x @ w, y @ w),
            mesh=mesh,
            in_specs=(spec(), spec(), spec("d")),
            out_specs=(spec(), spec("d")),
        )(params["W"], x, jnp.concatenate([x] * 4))
        return same, own

    adapted = lora_jax.adapt(fn, dropout=0.5)
    _, own = adapted(trained({"W": (6, 6)}), jnp.ones((1, 6)), lora_key=jax.random.key(3))
    assert len(np.unique(np.asarray(own).round(5), axis=0)) > 1


def test_a_lookup_is_dropped_whole() -> None:
    ids = jnp.arange(24).repeat(3)
    adapted = lora_jax.adapt(lambda p, ids: p["W"][ids], dropout=0.25)
    base = lora_jax.unwrap(SQUARE)["W"][ids]
    change = np.asarray(adapted(SQUARE, ids) - base)
    dropped = np.asarray(adapted(SQUARE, ids, lora_key=KEY) - base)
    is_kept = np.abs(dropped).max(axis=1) > 1e-4
    assert_agree(dropped[is_kept], change[is_kept] / 0.75, tolerance=1e-4)
    assert 0.5 < is_kept.mean() < 0.95


@jax.custom_jvp
def _with_jvp(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ kernel)


@_with_jvp.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (kernel, x), (kernel_dot, x_dot) = primals, tangents
    y = jnp.tanh(x @ kernel)
    return y, (1 - y**2) * (x_dot @ kernel + x @ kernel_dot)


@jax.custom_vjp
def _with_vjp(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ kernel)


def _forward(kernel: jax.Array, x: jax.Array) -> Any:
    y = jnp.tanh(x @ kernel)
    return y, (kernel, x, y)


def _backward(saved: Any, cotangent: jax.Array) -> Any:
    kernel, x, y = saved
    inner = cotangent * (1 - y**2)
    return x.T @ inner, inner @ kernel.T


_with_vjp.defvjp(_forward, _backward)

DIFFERENTIABLE: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "directly": lambda p, x: jnp.tanh(x @ p["W"]) @ p["W"],
    "remat": lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w) @ w)(p["W"], x),
    "remat in scan": lambda p, x: jax.lax.scan(
        jax.checkpoint(lambda h, _: (jnp.tanh(h @ p["W"]), None)), x, None, length=2
    )[0],
    "jit": lambda p, x: _inner(p["W"], jnp.tanh(_inner(p["W"], x))),
    "custom_jvp": lambda p, x: _with_jvp(p["W"], x),
    "custom_vjp": lambda p, x: _with_vjp(p["W"], x),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fn", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_the_gradient_is_that_of_the_masked_function(fn: Callable[..., jax.Array]) -> None:
    """Finite differences with the key fixed: what is computed again has the same mask."""
    wrapped = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), SQUARE)
    x = jnp.asarray(np.asarray(X, np.float64)) / 5
    adapters, frozen = lora_jax.split(wrapped)
    adapted = lora_jax.adapt(fn, dropout=0.5, on_materialize="ignore")

    def loss(adapters: Any) -> jax.Array:
        return jnp.sum(jnp.sin(adapted(lora_jax.combine(adapters, frozen), x, lora_key=KEY)))

    direction = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), adapters
    )
    along = sum(
        jnp.vdot(a, b)
        for a, b in zip(
            jax.tree.leaves(jax.grad(loss)(adapters)), jax.tree.leaves(direction), strict=True
        )
    )
    after, before = (
        loss(jax.tree.map(lambda a, d, s=step: a + s * d, adapters, direction))
        for step in (1e-6, -1e-6)
    )
    assert float(along) == pytest.approx(float(after - before) / 2e-6, rel=1e-4)
    value, _ = jax.value_and_grad(loss)(adapters)
    assert_agree(value, loss(adapters), size=x.size, tolerance=1e-12)


@pytest.mark.parametrize(
    ("fn", "shapes", "x_shape", "axes"),
    [
        (lambda p, x: x @ p["W"], {"W": (4, 3)}, (50, 4), None),
        (
            lambda p, x: jax.lax.conv_general_dilated(
                x,
                p["W"],
                (1,),
                "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=8,
            ),
            {"W": (3, 1, 8)},
            (1, 40, 8),
            {"W": ("in", "in", "out")},
        ),
    ],
    ids=["small weight", "depthwise convolution"],
)
def test_dropout_holds_where_building_the_weight_is_cheaper(
    fn: Any, shapes: Any, x_shape: Any, axes: Any
) -> None:
    """The choice by cost is between ways to compute one thing; it can't turn dropout off."""
    wrapped, x = trained(shapes, axes=axes), random(*x_shape)
    adapted = lora_jax.adapt(fn, dropout=0.5)
    difference = adapted(wrapped, x, lora_key=KEY) - adapted(wrapped, x)
    assert np.abs(np.asarray(difference)).max() > 1e-2


def test_no_key_but_a_rate_of_zero() -> None:
    with pytest.raises(ValueError, match="`lora_key` is given, but dropout is 0"):
        lora_jax.adapt(lambda p, x: x @ p["W"])(SQUARE, X, lora_key=KEY)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
def test_a_rate_that_is_no_probability(rate: float) -> None:
    with pytest.raises(ValueError, match=f"`dropout` is {rate}"):
        lora_jax.adapt(lambda p, x: x @ p["W"], dropout=rate)


def test_a_key_where_there_is_no_adapter() -> None:
    adapted = lora_jax.adapt(lambda p, x: x @ p["W"], dropout=0.5)
    plain = {"W": random(24, 24)}
    np.testing.assert_array_equal(adapted(plain, X, lora_key=KEY), X @ plain["W"])
