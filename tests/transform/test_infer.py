"""`infer_axes`: the axes of a weight, read off how a function uses it."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lora_jax
from tests.agreement import assert_agree

Shapes = dict[str, tuple[int, ...]]


def params_of(shapes: Shapes) -> dict[str, jax.Array]:
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def floats(*shape: int) -> jax.Array:
    return jnp.ones(shape)


IDS = jnp.arange(5, dtype=jnp.int32)


def conv(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def stacked(params: Any, x: jax.Array) -> jax.Array:
    def layer(h: jax.Array, layer_params: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ layer_params["W"]) * layer_params["scale"][None], None

    return jax.lax.scan(jax.checkpoint(layer), x, params)[0]


@jax.jit
def _jitted(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return x @ kernel


def bias_then_product(params: Any, x: jax.Array) -> jax.Array:
    return (x + params["bias"]) @ params["W"]


def tied(params: Any, ids: jax.Array) -> jax.Array:
    return jnp.tanh(params["W"][ids]) @ params["W"].T


IN_OUT = {"W": ("in", "out")}
CASES: dict[str, tuple[Callable[..., Any], Shapes, jax.Array, dict[str, tuple[str, ...]]]] = {
    "dense": (lambda p, x: x @ p["W"], {"W": (8, 6)}, floats(3, 8), IN_OUT),
    "transposed": (lambda p, x: x @ p["W"].T, {"W": (6, 8)}, floats(3, 8), {"W": ("out", "in")}),
    "on the left": (lambda p, x: p["W"] @ x, {"W": (6, 8)}, floats(8, 3), {"W": ("out", "in")}),
    "query": (
        lambda p, x: jnp.einsum("te,ehd->thd", x, p["W"]),
        {"W": (8, 2, 4)},
        floats(3, 8),
        {"W": ("in", "out", "out")},
    ),
    "out projection": (
        lambda p, x: jnp.einsum("thd,hde->te", x, p["W"]),
        {"W": (2, 4, 8)},
        floats(3, 2, 4),
        {"W": ("in", "in", "out")},
    ),
    "convolution": (
        lambda p, x: conv(x, p["W"]),
        {"W": (3, 3, 4, 6)},
        floats(1, 8, 8, 4),
        {"W": ("in", "in", "in", "out")},
    ),
    "1x1 convolution": (
        lambda p, x: conv(x, p["W"]),
        {"W": (1, 1, 4, 6)},
        floats(1, 8, 8, 4),
        {"W": ("in", "in", "in", "out")},
    ),
    "depthwise": (
        lambda p, x: conv(x, p["W"], groups=4),
        {"W": (3, 3, 1, 4)},
        floats(1, 8, 8, 4),
        {"W": ("in", "in", "in", "out")},
    ),
    "embedding": (lambda p, ids: p["W"][ids], {"W": (30, 8)}, IDS, IN_OUT),
    "take": (lambda p, ids: jnp.take(p["W"], ids, axis=0), {"W": (30, 8)}, IDS, IN_OUT),
    "tied embedding": (tied, {"W": (30, 8)}, IDS, IN_OUT),
    "scan": (
        stacked,
        {"W": (3, 8, 8), "scale": (3, 8)},
        floats(2, 8),
        {"W": ("batch", "in", "out")},
    ),
    "a stack of one": (
        stacked,
        {"W": (1, 8, 8), "scale": (1, 8)},
        floats(2, 8),
        {"W": ("batch", "in", "out")},
    ),
    "one output": (lambda p, x: x @ p["W"], {"W": (8, 1)}, floats(3, 8), IN_OUT),
    "one input": (lambda p, x: x @ p["W"], {"W": (1, 8)}, floats(3, 1), IN_OUT),
    "a layer by its number": (
        lambda p, x: x @ p["W"][1] @ p["W"][2],
        {"W": (3, 8, 8)},
        floats(2, 8),
        {"W": ("batch", "in", "out")},
    ),
    "jitted inside": (
        lambda p, x: jax.jit(lambda w, x: _jitted(w, x) + 1.0)(p["W"], x),
        {"W": (8, 6)},
        floats(3, 8),
        IN_OUT,
    ),
    "reshaped": (
        lambda p, x: x @ p["W"].reshape(8, 6),
        {"W": (8, 2, 3)},
        floats(3, 8),
        {"W": ("in", "out", "out")},
    ),
    "split up by a reshape": (
        lambda p, x: jnp.einsum("te,ehd->thd", x, p["W"].reshape(8, 2, 3)),
        {"W": (8, 6)},
        floats(3, 8),
        IN_OUT,
    ),
    "concatenated": (
        lambda p, x: x @ jnp.concatenate([p["Q"], p["K"]], axis=1),
        {"Q": (8, 6), "K": (8, 5)},
        floats(3, 8),
        {"Q": ("in", "out"), "K": ("in", "out")},
    ),
    "sliced": (lambda p, x: x @ p["W"][:, 2:5], {"W": (8, 6)}, floats(3, 8), IN_OUT),
    "scaled": (lambda p, x: x @ (p["W"] * 0.5), {"W": (8, 6)}, floats(3, 8), IN_OUT),
    "experts": (
        lambda p, x: jax.vmap(jnp.matmul)(x, p["W"]),
        {"W": (3, 8, 6)},
        floats(3, 4, 8),
        {"W": ("batch", "in", "out")},
    ),
    "ragged_dot": (
        lambda p, x: jax.lax.ragged_dot(x, p["W"], jnp.array([4, 0, 6], jnp.int32)),
        {"W": (3, 8, 6)},
        floats(10, 8),
        {"W": ("batch", "in", "out")},
    ),
    "a bias of two axes": (bias_then_product, {"W": (8, 6), "bias": (3, 8)}, floats(3, 8), IN_OUT),
    "unused": (lambda p, x: x @ p["W"], {"W": (8, 6), "idle": (8, 6)}, floats(3, 8), IN_OUT),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_the_axes(case: Any) -> None:
    fn, shapes, x, expected = case
    axes = lora_jax.infer_axes(fn, params_of(shapes), x)
    assert dict(axes) == expected
    assert not axes.disagreements
    assert set(axes.uses) == set(shapes)


def test_shapes_are_enough(case: Any) -> None:
    fn, shapes, x, expected = case
    params, x = jax.eval_shape(lambda: (params_of(shapes), x))
    assert dict(lora_jax.infer_axes(fn, params, x)) == expected


def test_wrapping_with_them_materialises_nothing(case: Any) -> None:
    fn, shapes, x, _ = case
    axes = lora_jax.infer_axes(fn, params_of(shapes), x)
    wrapped = lora_jax.wrap(params_of(shapes), list(axes), rank=1, axes=axes)
    report = lora_jax.explain(fn, wrapped, x)
    assert report.unused == ()
    assert report.materialized == ()


def test_unused_weights_are_named() -> None:
    axes = lora_jax.infer_axes(
        lambda p, x: x @ p["W"], params_of({"W": (8, 6), "idle": (4, 4)}), floats(2, 8)
    )
    assert axes.unused == ("idle",)
    assert "never used" in str(axes)
    with pytest.raises(ValueError, match=r"idle \(4, 4\): the function never uses it"):
        lora_jax.wrap(params_of({"W": (8, 6), "idle": (4, 4)}), "idle", rank=2, axes=axes)


def disagreeing(params: Any, x: jax.Array) -> jax.Array:
    heads = jnp.einsum("te,ehd->thd", x, params["W"])
    return jnp.einsum("thd,hdk->tk", heads, params["W"])


def test_uses_that_disagree_are_reported_and_refused() -> None:
    params = params_of({"W": (4, 4, 4)})
    axes = lora_jax.infer_axes(disagreeing, params, floats(3, 4))
    assert "W" not in axes
    first, second = axes.disagreements["W"]
    assert {first.axes, second.axes} == {("in", "out", "out"), ("in", "in", "out")}
    assert all("test_infer.py" in use.source for use in (first, second))
    with pytest.raises(ValueError, match="`axes` has none for 'W'.*its uses disagree"):
        lora_jax.wrap(params, "W", rank=2, axes=axes)
    by_hand = {"W": ("in", "out", "out")}
    assert lora_jax.wrap(params, "W", rank=2, axes=by_hand)["W"].rank == 2


def test_an_activation_is_no_weight() -> None:
    """What a bias, a norm or a position table meets is an activation from then on."""
    shapes = {"W": (8, 8), "bias": (3, 8), "scale": (3, 8), "position": (10, 8)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = (x + params["bias"]) * (1.0 + params["scale"]) + params["position"][:3]
        return jnp.tanh(h @ params["W"])

    axes = lora_jax.infer_axes(fn, params_of(shapes), floats(3, 8))
    assert dict(axes) == IN_OUT
    assert {
        path: axes.uses[path][0].axes for path in ("bias", "scale", "position")
    } == dict.fromkeys(("bias", "scale", "position"))


def test_arguments_but_the_first_hold_no_weights() -> None:
    params, other = params_of({"W": (8, 6)}), params_of({"V": (6, 4)})

    def fn(params: Any, x: jax.Array, *, other: Any, flag: bool) -> jax.Array:
        return x @ params["W"] @ other["V"] if flag else x

    axes = lora_jax.infer_axes(fn, params, floats(3, 8), other=other, flag=True)
    assert list(axes.uses) == ["W"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_any_floating_dtype(dtype: Any) -> None:
    params = {"W": jnp.ones((8, 6), dtype), "mask": jnp.ones((8, 6), jnp.int8)}
    axes = lora_jax.infer_axes(
        lambda p, x: x @ (p["W"] * p["mask"].astype(dtype)[0, 0]), params, jnp.ones((3, 8), dtype)
    )
    assert dict(axes) == IN_OUT


def test_wrapped_params_are_refused() -> None:
    wrapped = lora_jax.wrap(params_of({"W": (8, 6)}), "W", rank=2)
    with pytest.raises(ValueError, match="`params` is wrapped already"):
        lora_jax.infer_axes(lambda p, x: x @ p["W"], wrapped, floats(3, 8))


class Network(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        h = nn.Embed(30, 16)(ids)
        h = h + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(h))
        return nn.Dense(5)(h)


def test_a_linen_model() -> None:
    network = Network()
    variables = network.init(jax.random.key(0), IDS)
    axes = lora_jax.infer_axes(network.apply, variables, IDS)
    attention = "params/MultiHeadDotProductAttention_0"
    assert dict(axes) == {
        "params/Dense_0/kernel": ("in", "out"),
        "params/Embed_0/embedding": ("in", "out"),
        **{
            f"{attention}/{name}/kernel": ("in", "out", "out") for name in ("query", "key", "value")
        },
        f"{attention}/out/kernel": ("in", "in", "out"),
    }
    assert set(axes.linear) == {path for path in axes if "attention" in path.lower()}
    wrapped = lora_jax.wrap(variables, "all-linear", rank=2, axes=axes)
    actual = lora_jax.adapt(network.apply, on_materialize="error")(wrapped, IDS)
    assert_agree(actual, network.apply(variables, IDS))
