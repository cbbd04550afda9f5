"""DoRA: magnitudes, norms without AB, and the output against its definition in float64."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax._norms import gain
from tests.agreement import assert_agree
from tests.arrays import random
from tests.cases import CASES
from tests.test_wrap import LABELLINGS, SIZES
from tests.trained import as_if_trained


@functools.cache
def trained(axes: tuple[str, ...], dtype: Any = jnp.float32) -> Any:
    params = {"kernel": random(*SIZES[: len(axes)], dtype=dtype)}
    wrapped = lora_jax.wrap(
        params, "kernel", rank=2, alpha=3.0, axes={"kernel": axes}, dora=True, key=jax.random.key(1)
    )
    return as_if_trained(wrapped)


def definition(node: lora_jax.LoRAWeight) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weight and the norms with every axis kept, in float64."""
    axes = node.axes
    letters = dict.fromkeys(("batch", "in", "out"), "")
    for letter, role in zip("abcd", axes, strict=False):
        letters[role] += letter
    batch, inputs, outputs = letters["batch"], letters["in"], letters["out"]
    A, B, base, magnitude = (
        np.asarray(array, np.float64)
        for array in (node.lora_A, node.lora_B, node.base, node.magnitude)
    )
    whole = "abcd"[: len(axes)]
    change = np.einsum(f"{batch}{inputs}r,{batch}r{outputs}->{whole}", A, B)
    value = base + float(node.scale) * change
    norms = np.sqrt(np.einsum(f"{whole},{whole}->{batch}{outputs}", value, value))
    weight = np.einsum(f"{whole},{batch}{outputs}->{whole}", value, magnitude / norms)
    return weight, norms


@pytest.mark.parametrize("axes", LABELLINGS, ids="-".join)
def test_the_weight_is_direction_times_magnitude(axes: tuple[str, ...]) -> None:
    wrapped = trained(axes)
    weight, norms = definition(wrapped["kernel"])
    merged, own_gain = jax.jit(lambda tree: (lora_jax.merge(tree), gain(tree["kernel"])))(wrapped)
    assert_agree(merged["kernel"], weight)
    expected_gain = np.asarray(wrapped["kernel"].magnitude) / norms
    assert_agree(own_gain, expected_gain)


@pytest.mark.parametrize("axes", LABELLINGS, ids="-".join)
def test_the_magnitude_starts_as_the_norm(axes: tuple[str, ...]) -> None:
    params = {"kernel": random(*SIZES[: len(axes)])}
    wrapped = lora_jax.wrap(params, "kernel", rank=2, axes={"kernel": axes}, dora=True)
    node = wrapped["kernel"]
    sizes = zip(SIZES, axes, strict=False)
    assert math.prod(node.magnitude.shape) == math.prod(s for s, role in sizes if role != "in")
    assert_agree(node.magnitude, definition(node)[1])
    assert_agree(jax.jit(lora_jax.merge)(wrapped)["kernel"], params["kernel"])


def test_nothing_of_the_size_of_the_weight_is_built(optimised: None) -> None:
    """The norm's largest temporary array has the size of the factors, not that of W."""
    del optimised
    params = {"kernel": jnp.ones((512, 512))}
    wrapped = lora_jax.wrap(params, "kernel", rank=2, dora=True)
    compiled = jax.jit(gain).lower(wrapped["kernel"]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["kernel"].nbytes / 8


def test_the_norm_has_no_gradient() -> None:
    node = trained(("in", "out"))["kernel"]
    gradient = jax.jit(jax.grad(lambda node: jnp.sum(gain(node))))(node)
    assert np.any(np.asarray(gradient.magnitude))
    for name in ("base", "lora_A", "lora_B", "scale", "squared_norm"):
        assert not np.any(np.asarray(getattr(gradient, name)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_nothing_changes_at_initialisation(optimised: None, compiled: bool) -> None:
    """Law 1, in the programs that users run: op by op to the bit."""
    del optimised
    names = ["dense_vector", "conv_grouped"]
    # Op by op, these two are compiled too.
    names += ["jitted_inside", "scan_over_remat_of_a_stack"] if compiled else []
    for case in [case for case in CASES if case.name in names]:
        key = jax.random.key(7)
        params = {name: random(*shape) / shape[0] for name, shape in case.shapes.items()}
        wrapped = lora_jax.wrap(params, case.targets, rank=2, axes=case.axes, dora=True, key=key)
        x = random(*case.x_shape, seed=3)
        transform = jax.jit if compiled else lambda fn: fn
        actual = transform(lora_jax.adapt(case.fn))(wrapped, x)
        expected = transform(case.fn)(params, x)
        if compiled:
            assert_agree(actual, expected, tolerance=1e-6)
        else:
            np.testing.assert_array_equal(actual, expected)


def test_a_feature_that_is_zero_stays_zero() -> None:
    params = {"kernel": jnp.ones((5, 3)).at[:, 1].set(0)}
    wrapped = lora_jax.wrap(params, "kernel", rank=1, dora=True)
    adapted = lora_jax.adapt(lambda params, x: x @ params["kernel"])
    gradient = jax.jit(jax.grad(lambda tree: jnp.sum(adapted(tree, jnp.ones((2, 5))))))(wrapped)
    assert jax.jit(adapted)(wrapped, jnp.ones((2, 5))).tolist() == [[5, 0, 5]] * 2
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_magnitudes_of_a_bfloat16_weight_are_float32() -> None:
    node = trained(("in", "out"), jnp.bfloat16)["kernel"]
    assert (node.magnitude.dtype, node.squared_norm.dtype) == (jnp.float32, jnp.float32)
    wrapped = {"kernel": node}
    x = random(7, SIZES[0], dtype=jnp.bfloat16)
    actual = lora_jax.adapt(lambda params, x: x @ params["kernel"])(wrapped, x)
    expected = np.asarray(x, np.float64) @ definition(node)[0]
    assert actual.dtype == jnp.bfloat16
    assert_agree(np.asarray(actual, np.float64), expected, tolerance=0.03)


@pytest.mark.parametrize(
    "fn",
    [
        lambda params, ids: params["kernel"].at[ids].get(mode="fill", fill_value=2.0),
        lambda params, ids: params["kernel"].at[ids].get(mode="fill", fill_value=0.0),
        lambda params, ids: jnp.take(params["kernel"], ids, axis=0),
    ],
)
@pytest.mark.filterwarnings("ignore::lora_jax.MaterializationWarning")
def test_an_index_out_of_bounds_gives_the_fill_value(fn: Any) -> None:
    wrapped, ids = trained(("in", "out")), jnp.array([0, 9, 2])
    actual = lora_jax.adapt(fn)(wrapped, ids)
    expected = fn(lora_jax.merge(wrapped), ids)
    assert jnp.isnan(actual).tolist() == jnp.isnan(expected).tolist()
    assert_agree(jnp.nan_to_num(actual), jnp.nan_to_num(expected))


def test_the_label_of_a_magnitude() -> None:
    wrapped = trained(("in", "out"))
    assert lora_jax.labels(wrapped)["kernel"].magnitude == "magnitude"
    adapters, frozen = lora_jax.split(wrapped)
    assert adapters["kernel"].magnitude is wrapped["kernel"].magnitude
    assert frozen["kernel"].squared_norm is wrapped["kernel"].squared_norm


def test_a_change_that_cancels_the_weight_keeps_the_gain_bounded() -> None:
    """What is left of the norm is rounding; it must not become a gain of any size."""
    base = random(6, 4)
    U, _, _ = jnp.linalg.svd(base, full_matrices=False)
    wrapped = lora_jax.wrap({"kernel": base}, "kernel", rank=4, dora=True)
    for left, tolerance in ((0.1, 1e-3), (1e-4, None), (0.0, None)):
        lora_B = (left - 1) * U.T @ base
        gains = np.asarray(gain(dataclasses.replace(wrapped["kernel"], lora_A=U, lora_B=lora_B)))
        assert np.all(gains < 1e4)
        if tolerance is not None:
            np.testing.assert_allclose(gains * left, 1, rtol=tolerance)
