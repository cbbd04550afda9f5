"""Merging into quantised weights: the sum quantised as the base was, and what that loses."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.arrays import random
from tests.dequantized import dequantized
from tests.trained import as_if_trained

FORMATS = ("nf4", "int8", "int4", "fp8_e4m3")
AXES = {"stack": ("batch", "in", "out"), "head": ("in", "out")}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "pissa dora": {"init": "pissa", "dora": True},
}


# The battery runs every op with every format: here each occurs once, and nf4 with every setting.
KINDS = [*(("nf4", name) for name in SETTINGS), *((form, "dora") for form in FORMATS[1:])]


def params(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    return {"stack": random(3, 70, 40, dtype=dtype), "head": random(70, 5, dtype=dtype)}


def trained(form: str = "nf4", dtype: Any = jnp.float32, **settings: Any) -> tuple[Any, Any]:
    """Returns quantised params, and the same with adapters."""
    quantized = lora_jax.quantize(params(dtype), ".*", format=form, axes=AXES)
    options = {"rank": 3, **settings}
    return quantized, as_if_trained(lora_jax.wrap(quantized, ".*", axes=AXES, **options))


def requantized(wrapped: Any, **options: Any) -> tuple[Any, lora_jax.RequantizationWarning]:
    with pytest.warns(lora_jax.RequantizationWarning) as caught:
        merged = lora_jax.merge(wrapped, requantize=True, **options)
    assert len(caught) == 1
    return merged, caught[0].message


def in_float64(node: Any, *, with_change: bool = True) -> np.ndarray:
    """Returns the value of a node, or that of the weight that was wrapped."""
    base, A, B = (
        np.asarray(each, np.float64) for each in (dequantized(node.base), node.lora_A, node.lora_B)
    )
    value = base + float(node.scale) * A @ B
    if not with_change:
        moved = node.initial_A is not None
        value = base + np.asarray(node.initial_A, np.float64) @ node.initial_B if moved else base
    elif node.magnitude is not None:
        norms = np.linalg.norm(value, axis=-2, keepdims=True)
        value = value * np.asarray(node.magnitude)[..., None, :] / norms
    return value


@pytest.mark.parametrize(("form", "name"), KINDS)
def test_the_sum_is_quantised_as_the_base_was(form: str, name: str) -> None:
    quantized, wrapped = trained(form, **SETTINGS[name])
    merged, _ = requantized(wrapped)
    assert jax.tree.structure(merged) == jax.tree.structure(quantized)
    again = lora_jax.quantize(
        {path: jnp.asarray(in_float64(node), jnp.float32) for path, node in wrapped.items()},
        ".*",
        format=form,
        axes=AXES,
    )
    for path in quantized:
        # A sum that lies between two codes may be rounded to the other one.
        assert_agree(dequantized(merged[path]), dequantized(again[path]), tolerance=4e-3)
        plain = lora_jax.merge(wrapped)[path]
        assert_agree(plain, in_float64(wrapped[path]))


@pytest.mark.parametrize(("form", "name"), KINDS)
def test_the_errors(form: str, name: str) -> None:
    _, wrapped = trained(form, **SETTINGS[name])
    merged, warning = requantized(wrapped)
    compiled = jax.jit(lora_jax.requantization_errors)(wrapped)
    for path, node in wrapped.items():
        before, after = in_float64(node, with_change=False), in_float64(node)
        rounded = dequantized(dataclasses.replace(merged[path], dtype_name="float32"))
        change, size = after - before, np.linalg.norm(after)
        expected = lora_jax.RequantizationError(
            error=np.linalg.norm(rounded - after) / size,
            change=np.linalg.norm(change) / size,
            kept=np.sum((rounded - before) * change) / np.sum(change**2),
        )
        for found in (warning.errors[path], compiled[path]):
            assert_agree(found, expected, tolerance=2e-3)
        assert isinstance(warning.errors[path].error, float)
        assert f"'{path}': rounding changes it by" in str(warning)


def test_a_change_that_is_lost_is_said_to_be() -> None:
    _, wrapped = trained("int4")
    small = {
        path: dataclasses.replace(node, scale=node.scale * 1e-4) for path, node in wrapped.items()
    }
    merged, warning = requantized(small)
    assert merged["head"].format == "int4"
    np.testing.assert_array_equal(merged["head"].codes, small["head"].base.codes)
    assert abs(warning.errors["head"].kept) < 0.3
    untouched = lora_jax.wrap(lora_jax.quantize(params(), "head"), "head", rank=2)
    assert lora_jax.requantization_errors(untouched)["head"].kept == 1


def test_a_long_warning_names_the_worst() -> None:
    quantized = lora_jax.quantize({f"w{i}": random(8, 4, seed=i) for i in range(12)}, ".*")
    wrapped = as_if_trained(lora_jax.wrap(quantized, ".*", rank=1))
    _, warning = requantized(wrapped)
    worst = min(warning.errors, key=lambda path: warning.errors[path].kept)
    assert str(warning).splitlines()[1].startswith(f"'{worst}'")
    assert "and 4 more, in the attribute `errors`" in str(warning)


def test_layers_that_are_not_adapted_keep_their_codes() -> None:
    quantized = lora_jax.quantize(params(), "stack", axes=AXES)
    wrapped = as_if_trained(lora_jax.wrap(quantized, "stack", rank=2, axes=AXES, layers=[0, 2]))
    merged, warning = requantized(wrapped)
    before, after = quantized["stack"], merged["stack"]
    jax.tree.map(lambda old, new: np.testing.assert_array_equal(old[1], new[1]), before, after)
    assert np.any(np.asarray(before.codes[0]) != np.asarray(after.codes[0]))
    assert list(warning.errors) == ["stack"]


def test_what_is_not_quantised_or_not_chosen_is_merged_as_ever() -> None:
    quantized, _ = trained()
    tree = {**quantized, "dense": random(6, 4)}
    wrapped = as_if_trained(lora_jax.wrap(tree, "head|dense", rank=2))
    merged, warning = requantized(wrapped)
    assert list(warning.errors) == ["head"]
    assert_agree(merged["dense"], lora_jax.merge(wrapped)["dense"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        only = lora_jax.merge(wrapped, targets="dense", requantize=True)
        lora_jax.merge(wrapped)
    assert isinstance(only["head"], lora_jax.LoRAWeight)
    stacked = lora_jax.merge(wrapped, safe=True)
    assert stacked["head"].dtype == jnp.float32


def test_under_jit_and_in_bfloat16() -> None:
    _, wrapped = trained("int8", jnp.bfloat16)
    merged, _ = requantized(wrapped)
    assert {leaf.dtype for leaf in merged.values()} == {jnp.dtype(jnp.bfloat16)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = jax.jit(lambda wrapped: lora_jax.merge(wrapped, requantize=True))(wrapped)
    for path, weight in merged.items():
        assert_agree(dequantized(compiled[path]), dequantized(weight), tolerance=3e-3)


def test_adapters_on_adapters() -> None:
    quantized, wrapped = trained("int8")
    inner = wrapped["head"]
    outer = dataclasses.replace(trained("int8")[1]["head"], base=inner)
    merged, _ = requantized({"head": outer})
    assert merged["head"].format == "int8"
    assert_agree(
        dequantized(merged["head"]), lora_jax.merge({"head": outer})["head"], tolerance=2e-2
    )
    assert lora_jax.unwrap({"head": outer})["head"] is inner.base
    assert jax.tree.structure(lora_jax.unwrap(wrapped)) == jax.tree.structure(quantized)


def test_a_requantised_merge_can_not_be_taken_back() -> None:
    _, wrapped = trained()
    merged, _ = requantized(wrapped)
    with pytest.raises(ValueError, match=r"`merged` is quantised at 'head'.*unwrap\(wrapped\)"):
        lora_jax.unmerge(merged, wrapped)
    back = lora_jax.unmerge(lora_jax.merge(wrapped), wrapped)
    for path, node in back.items():
        assert_agree(node.base, dequantized(wrapped[path].base), tolerance=1e-5)


def test_formats_that_are_only_read_are_refused() -> None:
    weight = lora_jax.quantize({"head": random(64, 5)}, "head", double_quantize=False)["head"]
    read = dataclasses.replace(weight, format="uint4", offsets=weight.scales)
    wrapped = lora_jax.wrap({"head": read}, "head", rank=2)
    for call in (lora_jax.requantization_errors, lambda w: lora_jax.merge(w, requantize=True)):
        with pytest.raises(ValueError, match="'head' has a base of the format uint4, to which"):
            call(wrapped)
    assert lora_jax.merge(wrapped)["head"].shape == (64, 5)
