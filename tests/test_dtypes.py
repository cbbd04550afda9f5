"""Weights and factors of narrow dtypes: everything but the transform."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax._dtypes import common_dtype
from lora_jax.exchange import peft
from tests.agreement import assert_agree
from tests.trained import as_if_trained

NARROW = (
    "float4_e2m1fn",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
)
HALF = ("bfloat16", "float16")


def matrix(dtype: Any, *shape: int, seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape or (12, 10)).clip(-2, 2)
    return jnp.asarray(values.astype(np.float32)).astype(dtype)


def in_float64(array: Any) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32), np.float64)


def dense(node: lora_jax.LoRAWeight) -> np.ndarray:
    """Returns what a weight (in, out) stands for, in float64."""
    value = in_float64(node.base) + in_float64(node.scale) * (
        in_float64(node.lora_A) @ in_float64(node.lora_B)
    )
    if node.magnitude is None:
        return value
    norm = np.linalg.norm(value, axis=0)
    return value * np.where(norm > 0, in_float64(node.magnitude) / np.where(norm > 0, norm, 1), 0)


def trained(wrapped: Any, *, keep_zero: int | None = None) -> Any:
    """Returns the tree with another lora_B, which leaves a column of the weight as it is."""
    tree = as_if_trained(wrapped, only=["lora_B"])
    if keep_zero is None:
        return tree
    column = wrapped["kernel"].lora_B[:, keep_zero]
    lora_B = tree["kernel"].lora_B.at[:, keep_zero].set(column)
    return {"kernel": dataclasses.replace(tree["kernel"], lora_B=lora_B)}


# --- weights of a byte or less -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_narrow_weight(dtype: str, dora: bool, init: str) -> None:
    params = {"kernel": matrix(dtype)}
    wrapped = lora_jax.wrap(params, "kernel", rank=2, dora=dora, init=init)
    node = wrapped["kernel"]
    assert (node.dtype, node.lora_A.dtype, node.scale.dtype) == (dtype, jnp.float32, jnp.float32)
    if init == "kaiming":
        assert lora_jax.unwrap(wrapped)["kernel"] is params["kernel"]
    wrapped = trained(wrapped)
    merged = lora_jax.merge(wrapped)["kernel"]
    assert merged.dtype == dtype
    # One rounding: half a unit in the last place, which is at most eps / 2 of a value.
    epsilon = float(jnp.finfo(dtype).eps)
    assert_agree(in_float64(merged), dense(wrapped["kernel"]), tolerance=epsilon / 2)
    if not dora:
        back = lora_jax.unmerge({"kernel": merged}, wrapped)["kernel"].base
        size = np.abs(in_float64(merged)).max() * np.sqrt(merged.size)
        assert_agree(in_float64(back), in_float64(node.base), tolerance=epsilon, size=size)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_rest_of_the_library_takes_a_narrow_weight(dtype: str) -> None:
    params = {"kernel": matrix(dtype)}
    wrapped = trained(lora_jax.wrap(params, "kernel", rank=2))
    merged = dense(wrapped["kernel"])
    for tree in (
        lora_jax.arithmetic.resize(wrapped, 3),
        lora_jax.arithmetic.on_original_base(wrapped),
        lora_jax.arithmetic.extract(
            params, {"kernel": jnp.asarray(merged, jnp.float32)}, "kernel", rank=10
        ),
    ):
        assert tree["kernel"].dtype == dtype
        assert_agree(dense(tree["kernel"]), merged)
    assert "kernel" in lora_jax.summary(wrapped)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float4_e2m1fn"])
def test_factors_must_be_wide_enough_to_train(dtype: str) -> None:
    with pytest.raises(TypeError, match=f"`dtype` is.*{dtype}.*at least 16 bits"):
        lora_jax.wrap({"kernel": matrix(jnp.float32)}, "kernel", rank=2, dtype=dtype)


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("other", [*HALF, "float32", "float8_e4m3fn"])
def test_the_common_dtype_holds_both(narrow: str, other: str) -> None:
    common = common_dtype(jnp.dtype(narrow), jnp.dtype(other))
    for dtype in (narrow, other):
        limits = jnp.asarray([jnp.finfo(dtype).max, jnp.finfo(dtype).smallest_normal], dtype)
        np.testing.assert_array_equal(
            limits.astype(jnp.float32), limits.astype(common).astype(jnp.float32)
        )


# --- trees that were cast ------------------------------------------------------------------------


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@pytest.mark.parametrize("zero", [None, 3], ids=["", "a zero column"])
@pytest.mark.parametrize("factor", [1.0, 300.0], ids=["", "squares that overflow"])
@pytest.mark.parametrize("dtype", [*HALF, "float32"])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
class TestCastDora:
    def wrapped(self, dtype: str, zero: int | None, factor: float, init: str) -> Any:
        kernel = factor * matrix(jnp.float32)
        kernel = kernel if zero is None else kernel.at[:, zero].set(0)
        wrapped = lora_jax.wrap({"kernel": kernel}, "kernel", rank=2, dora=True, init=init)
        return cast(trained(wrapped, keep_zero=zero), dtype)

    def test_merge(self, dtype: str, zero: int | None, factor: float, init: str) -> None:
        wrapped = self.wrapped(dtype, zero, factor, init)
        merged = lora_jax.merge(wrapped, safe=True)["kernel"]
        assert merged.dtype == dtype
        tolerance = max(1e-5, float(jnp.finfo(dtype).eps))
        assert_agree(in_float64(merged), dense(wrapped["kernel"]), tolerance=tolerance)

    def test_the_function(self, dtype: str, zero: int | None, factor: float, init: str) -> None:
        wrapped = self.wrapped(dtype, zero, factor, init)
        x = matrix(dtype, 4, 12, seed=3) / factor

        @jax.jit
        def output(wrapped: Any, x: Any) -> Any:
            return lora_jax.adapt(lambda params, x: x @ params["kernel"])(wrapped, x)

        expected = in_float64(x) @ dense(wrapped["kernel"])
        tolerance = max(1e-5, 4 * float(jnp.finfo(dtype).eps))
        assert_agree(in_float64(output(wrapped, x)), expected, tolerance=tolerance)


@pytest.mark.parametrize("dtype", HALF)
def test_a_zero_column_through_peft_files(dtype: str, tmp_path: Any) -> None:
    params = {"kernel": matrix(dtype).at[:, 3].set(0)}
    wrapped = lora_jax.wrap(params, "kernel", rank=2, dora=True)
    wrapped = cast(trained(wrapped, keep_zero=3), dtype)
    names = [peft.Rule("kernel.weight", "kernel")]
    peft.save(tmp_path / "adapter", wrapped, names=names)
    loaded = peft.load(tmp_path / "adapter", params, names=names)
    merged = lora_jax.merge(loaded, safe=True)["kernel"]
    assert_agree(
        in_float64(merged), dense(wrapped["kernel"]), tolerance=2 * float(jnp.finfo(dtype).eps)
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("function", ["resize", "on_original_base", "unwrap", "unmerge"])
def test_a_cast_tree_goes_through_everything(dtype: str, function: str) -> None:
    wrapped = lora_jax.wrap(
        {"kernel": matrix(jnp.float32)}, "kernel", rank=2, init="pissa", alpha=3
    )
    wrapped = cast(trained(wrapped), dtype)
    merged = lora_jax.merge(wrapped)["kernel"]
    functions = {
        "resize": functools.partial(lora_jax.arithmetic.resize, rank=3),
        "on_original_base": lora_jax.arithmetic.on_original_base,
        "unwrap": lora_jax.unwrap,
        "unmerge": lambda wrapped: lora_jax.unmerge({"kernel": merged}, wrapped),
    }
    result = functions[function](wrapped)["kernel"]
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    if function == "unwrap":
        assert (result.dtype, result.shape) == (dtype, (12, 10))
        assert_agree(in_float64(result), in_float64(matrix(jnp.float32)), tolerance=tolerance)
    else:
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(dtype)}
        assert_agree(dense(result), dense(wrapped["kernel"]), tolerance=tolerance)
