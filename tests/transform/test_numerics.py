"""Dtypes and precision: what a low-precision model computes with factors of higher precision."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.arrays import random
from tests.jaxprs import equations

KEY = jax.random.key(4)


def node(base: jax.Array, rank: int = 4, **options: Any) -> dict[str, lora_jax.LoRAWeight]:
    made = lora_jax.wrap({"W": base}, "W", rank=rank, alpha=3.0, init="gaussian", **options)["W"]
    B = random(*made.lora_B.shape, dtype=made.lora_B.dtype, seed=9)
    return {"W": lora_jax.LoRAWeight(made.base, made.lora_A, B, made.scale, made.axes)}


def project(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["W"]


def in_float64(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(array, np.float64) for array in arrays]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_change_is_computed_in_the_factors_dtype_and_cast_once(dtype: Any) -> None:
    wrapped = node(jnp.zeros((64, 48), dtype))
    x = random(16, 64, dtype=dtype)
    actual = lora_jax.adapt(project)(wrapped, x)
    assert actual.dtype == dtype
    X, A, B, scale = in_float64(x, wrapped["W"].lora_A, wrapped["W"].lora_B, wrapped["W"].scale)
    exact = scale * (X @ A @ B)
    digits = jnp.finfo(dtype).nmant
    ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - digits)
    # With a base of zeros, all that is left is the rounding of one cast.
    assert (np.abs(np.asarray(actual, np.float64) - exact) / ulp).max() < 0.51

    all_low = node(jnp.zeros((64, 48), dtype), dtype=dtype)
    all_low = {"W": jax.tree.map(lambda low, high: high.astype(low.dtype), all_low, wrapped)["W"]}
    low = lora_jax.adapt(project)(all_low, x)
    error = np.abs(np.asarray(low, np.float64) - exact).mean()
    assert np.abs(np.asarray(actual, np.float64) - exact).mean() < 0.8 * error


@pytest.mark.parametrize("factors", [None, jnp.bfloat16])
@pytest.mark.parametrize("base", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("op", ["product", "lookup", "convolution", "materialised", "dense"])
def test_the_model_keeps_its_dtype(base: Any, factors: Any, op: str) -> None:
    ops = {
        "product": lambda p, x: x @ p["W"],
        "lookup": lambda p, x: p["W"][jnp.arange(3)],
        "convolution": lambda p, x: jax.lax.conv_general_dilated(
            x[None], p["W"][None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        "materialised": lambda p, x: x @ jnp.sin(p["W"]),
        "dense": lambda p, x: jnp.concatenate([x] * 40) @ p["W"],
    }
    rank = 12 if op == "dense" else 2
    wrapped, x = node(random(12, 14, dtype=base), rank, dtype=factors), random(8, 12, dtype=base)
    adapted = lora_jax.adapt(ops[op], on_materialize="ignore")
    assert adapted(wrapped, x).dtype == ops[op](lora_jax.unwrap(wrapped), x).dtype == base
    gradient = jax.grad(lambda w: adapted(w, x).astype(jnp.float32).sum())(wrapped)["W"]
    assert gradient.lora_A.dtype == wrapped["W"].lora_A.dtype


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_model_that_casts_its_float32_weights(dtype: Any) -> None:
    network = nn.Dense(48, dtype=dtype)
    x = random(16, 64)
    params = network.init(KEY, x)["params"]
    wrapped = lora_jax.wrap(params, "kernel", rank=4, init="gaussian")
    kernel = wrapped["kernel"]
    B = random(4, 48, seed=3)
    wrapped = {
        **wrapped,
        "kernel": lora_jax.LoRAWeight(kernel.base, kernel.lora_A, B, kernel.scale, kernel.axes),
    }
    actual = lora_jax.adapt(network.apply)({"params": wrapped}, x)
    assert actual.dtype == dtype
    W, A, B, X = in_float64(kernel.base, kernel.lora_A, B, x)
    exact = X @ (W + A @ B)
    error = np.linalg.norm(np.asarray(actual, np.float64) - exact) / np.linalg.norm(exact)
    assert error < 2 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("precision", [None, "default", "high", "highest"])
@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_precision_and_accumulation_are_those_of_the_model(precision: Any, preferred: Any) -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.dot(x, params["W"], precision=precision, preferred_element_type=preferred)

    wrapped, x = node(random(64, 48, dtype=jnp.bfloat16)), random(2, 64, dtype=jnp.bfloat16)
    (original,) = equations(jax.make_jaxpr(fn)(lora_jax.unwrap(wrapped), x).jaxpr, "dot_general")
    found = list(equations(jax.make_jaxpr(lora_jax.adapt(fn))(wrapped, x).jaxpr, "dot_general"))
    base = [e for e in found if [v.aval.shape for v in e.invars] == [(2, 64), (64, 48)]]
    assert len(base) == 1
    assert base[0].params == original.params
    assert len(found) == 3
    for equation in found:
        assert equation.params["precision"] == original.params["precision"]
        if equation is not base[0]:
            assert equation.params["preferred_element_type"] == jnp.float32


def test_precision_of_a_convolution_holds_for_the_mixing_too() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x[None],
            params["W"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision="highest",
        )

    wrapped = node(random(3, 32, 32), axes={"W": ("in", "in", "out")})
    jaxpr = jax.make_jaxpr(lora_jax.adapt(fn))(wrapped, random(10, 32)).jaxpr
    convolutions = list(equations(jaxpr, "conv_general_dilated"))
    products = list(equations(jaxpr, "dot_general"))
    assert (len(convolutions), len(products)) == (2, 1)
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert {e.params["precision"] for e in [*convolutions, *products]} == {highest}


def test_the_default_precision_of_the_caller_holds() -> None:
    wrapped, x = node(random(64, 48)), random(2, 64)
    adapted = lora_jax.adapt(project)
    plain = jax.make_jaxpr(adapted)(wrapped, x).jaxpr
    with jax.default_matmul_precision("highest"):
        precise = jax.make_jaxpr(adapted)(wrapped, x).jaxpr
    assert {str(e.params["precision"]) for e in equations(plain, "dot_general")} == {"None"}
    for equation in equations(precise, "dot_general"):
        assert "HIGHEST" in str(equation.params["precision"])


def test_a_weight_divided_by_an_array_loses_nothing_in_bfloat16() -> None:
    """1 / g rounded to bfloat16 would cost the factors the digits that they have."""
    wrapped = node(jnp.zeros((64, 48), jnp.bfloat16))
    g = (1.5 + random(48, seed=2) ** 2).astype(jnp.bfloat16)
    x = random(16, 64, dtype=jnp.bfloat16)
    actual = lora_jax.adapt(lambda p, x, g: x @ (p["W"] / g[None]))(wrapped, x, g)
    X, A, B, scale, G = in_float64(
        x, wrapped["W"].lora_A, wrapped["W"].lora_B, wrapped["W"].scale, g
    )
    exact = scale * (X @ A @ B) / G
    ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    assert (np.abs(np.asarray(actual, np.float64) - exact) / ulp).max() < 0.52


def test_the_scale_of_a_dropout_mask_is_exact_in_bfloat16() -> None:
    """0.9 in bfloat16 is 0.8984: an adapter input that is divided in bfloat16 is biased."""
    base, x = jnp.zeros((64, 48), jnp.bfloat16), jnp.ones((1, 64), jnp.bfloat16)
    A, B, one = jnp.ones((64, 4)), jnp.ones((4, 48)), jnp.ones(())
    weight = {"W": lora_jax.LoRAWeight(base, A, B, one, ("in", "out"))}

    def wide(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.dot(x, params["W"], preferred_element_type=jnp.float32)

    actual = lora_jax.adapt(wide, dropout=0.1)(weight, x, lora_key=KEY)
    # Each kept input adds rank · 1 / 0.9, so the sum is a whole multiple of that.
    kept = float(actual[0, 0]) * 0.9 / 4
    assert kept == pytest.approx(round(kept), abs=1e-3)


def test_building_the_weight_is_as_exact_as_its_factors() -> None:
    """bfloat16 factors over a float32 weight: whether W + AB is built does not show."""
    params = {"kernel": random(64, 64, seed=0)}
    x = random(64, 64, seed=1)
    fn = lambda params, x: x @ params["kernel"]  # noqa: E731
    for rank, how in ((2, "factored"), (48, "dense")):
        wrapped = lora_jax.wrap(params, "kernel", rank=rank, init="pissa", dtype=jnp.bfloat16)
        (target,) = lora_jax.explain(fn, wrapped, x).targets
        assert {use.how for use in target.uses} == {how}
        assert_agree(lora_jax.adapt(fn)(wrapped, x), fn(lora_jax.merge(wrapped), x), tolerance=1e-4)
