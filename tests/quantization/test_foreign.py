"""Quantised arrays of other libraries as bases: a class of the test's own, and Qwix's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.trained import as_if_trained

DEPTH, WIDTH = 4, 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByColumn:
    """Whole numbers with a scale for each column; a stack has both in front."""

    numbers: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape


def dense(array: ByColumn) -> jax.Array:
    return array.numbers.astype(array.scales.dtype) * array.scales


def of_own(weight: np.ndarray) -> tuple[Any, Any]:
    scales = np.max(np.abs(weight), axis=-2, keepdims=True) / 127
    numbers = np.round(weight / scales).astype(np.int8)
    return ByColumn(jnp.asarray(numbers), jnp.asarray(scales)), dense


def of_qwix(weight: np.ndarray) -> tuple[Any, Any]:
    qwix = pytest.importorskip("qwix", reason="Qwix is a peer: pip install --group peers")
    batch = (0,) if weight.ndim > 2 else ()
    array = qwix.quantize(
        jnp.asarray(weight),
        jnp.int8,
        channelwise_axes=(*batch, weight.ndim - 1),
        tiled_axes={weight.ndim - 2: 16},
    )
    return array, qwix.dequantize


MAKERS = [of_own, of_qwix]
makers = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def declared(make: Any, *shape: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns params with a declared weight, and those with what it dequantises to."""
    weight = np.random.default_rng(5).standard_normal(shape).astype(np.float32) / 8
    array, dequantize = make(weight)
    params = {"w": array, "bias": jnp.ones(shape[-1])}
    found = lora_jax.quantization.declare(params, type(array), dequantize=dequantize)
    return found, {**params, "w": dequantize(array)}


def layers(params: Any, x: Any) -> Any:
    def layer(h: Any, w: Any) -> tuple[Any, None]:
        return jnp.tanh(h @ w), None

    return jax.lax.scan(layer, x, params["w"])[0] + params["bias"][None]


@makers
def test_a_declared_weight_is_a_base(make: Any) -> None:
    params, expected = declared(make, DEPTH, WIDTH, WIDTH)
    weight = params["w"]
    assert (weight.shape, weight.dtype) == ((DEPTH, WIDTH, WIDTH), jnp.float32)
    axes = {"w": ("batch", "in", "out")}
    wrapped = as_if_trained(lora_jax.wrap(params, "w", rank=2, axes=axes))
    by_hand = as_if_trained(lora_jax.wrap(expected, "w", rank=2, axes=axes))
    x = jnp.ones((3, WIDTH))

    def loss(adapters: Any, frozen: Any) -> Any:
        return jnp.sum(lora_jax.adapt(layers)(lora_jax.combine(adapters, frozen), x) ** 2)

    compute = jax.jit(jax.value_and_grad(loss))
    found, gradient = compute(*lora_jax.split(wrapped))
    value, dense_gradient = compute(*lora_jax.split(by_hand))
    assert_agree(found, value, tolerance=1e-5)
    assert_agree(jax.tree.leaves(gradient), jax.tree.leaves(dense_gradient), tolerance=1e-5)
    assert_agree(lora_jax.adapt(layers)(params, x), layers(expected, x), tolerance=1e-6)
    assert_agree(lora_jax.merge(wrapped)["w"], lora_jax.merge(by_hand)["w"], tolerance=1e-6)


@makers
def test_a_loop_keeps_the_codes(make: Any) -> None:
    """What a scan's backward pass keeps has no float as large as the stack."""
    params, _ = declared(make, DEPTH, WIDTH, WIDTH)
    assert params["w"].batch_ndim == 1
    wrapped = lora_jax.wrap(params, "w", rank=2, axes={"w": ("batch", "in", "out")})
    adapters, frozen = lora_jax.split(wrapped)

    def loss(adapters: Any) -> Any:
        wrapped = lora_jax.combine(adapters, frozen)
        return jnp.sum(lora_jax.adapt(layers)(wrapped, jnp.ones((3, WIDTH))))

    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapters)
    kept = [
        variable.aval
        for equation in jaxpr.eqns
        if equation.primitive.name == "scan"
        for variable in equation.outvars
    ]
    assert kept
    assert not any(aval.size >= DEPTH * WIDTH * WIDTH for aval in kept)


@makers
def test_a_kernel_has_no_axis_to_cut(make: Any) -> None:
    """Rows share scales, so that a row of all leaves is not the row of the weight."""
    params, _ = declared(make, WIDTH, WIDTH)
    assert params["w"].batch_ndim == 0


def test_an_initialiser_that_changes_the_base_is_refused() -> None:
    params, _ = declared(of_own, WIDTH, WIDTH)
    with pytest.raises(ValueError, match="array of another library; expected one that keeps it"):
        lora_jax.wrap(params, "w", rank=2, init="pissa")


def test_a_type_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="`params` holds no ByColumn"):
        lora_jax.quantization.declare({"w": jnp.ones((2, 2))}, ByColumn, dequantize=dense)
