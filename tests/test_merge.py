"""`merge` and `unmerge`: any subset, half precision, and values that are not finite."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.serving.models import DENSE, MODELS, SCANNED, Model
from tests.trained import as_if_trained


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"rslora": True}], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_unmerge_takes_out_what_was_merged(model: Model, options: dict[str, Any]) -> None:
    """Law 3: unmerge(merge(w)) ≈ w."""
    wrapped = model.adapter(0, **options)
    back = lora_jax.unmerge(lora_jax.merge(wrapped), wrapped)
    assert jax.tree.structure(back) == jax.tree.structure(wrapped)
    for actual, expected in zip(jax.tree.leaves(back), jax.tree.leaves(wrapped), strict=True):
        assert_agree(actual, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_left_once(dtype: Any) -> None:
    params = {"W": DENSE.params["W1"].astype(dtype)}
    wrapped = as_if_trained(lora_jax.wrap(params, "W", rank=2), 0)
    merged = lora_jax.merge(wrapped)["W"]
    node = wrapped["W"]
    exact = np.asarray(node.base, np.float64) + float(node.scale) * (
        np.asarray(node.lora_A, np.float64) @ np.asarray(node.lora_B, np.float64)
    )
    rounded_once = jnp.asarray(exact.astype(np.float32)).astype(dtype)
    # A sum in float32 may lie on the other side of the middle between two values of the dtype.
    assert np.mean(np.asarray(merged != rounded_once)) < 0.02
    back = lora_jax.unmerge({"W": merged}, wrapped)["W"].base
    assert back.dtype == dtype
    assert_agree(back, node.base, size=exact, tolerance=2 * float(jnp.finfo(dtype).eps))


def test_a_subset_is_merged_and_taken_out() -> None:
    wrapped = DENSE.adapter(0)
    partly = lora_jax.merge(wrapped, targets="W1")
    assert_agree(partly["W1"], lora_jax.merge(wrapped)["W1"])
    assert partly["W2"] is wrapped["W2"]
    assert partly["b"] is wrapped["b"]
    expected = DENSE.fn(lora_jax.merge(wrapped), DENSE.x)
    assert_agree(lora_jax.adapt(DENSE.fn)(partly, DENSE.x), expected)
    back = lora_jax.unmerge(partly, wrapped)
    assert_agree(back["W1"].base, wrapped["W1"].base)
    assert back["W2"] is wrapped["W2"]
    back = lora_jax.unmerge(lora_jax.merge(wrapped), wrapped, targets="W2")
    assert isinstance(back["W2"], lora_jax.LoRAWeight)
    assert not isinstance(back["W1"], lora_jax.LoRAWeight)


def test_a_subset_may_be_a_predicate_or_several_expressions() -> None:
    wrapped = DENSE.adapter(0)
    large = lora_jax.merge(wrapped, targets=lambda path, leaf: leaf.shape[0] == 12)
    assert not isinstance(large["W1"], lora_jax.LoRAWeight)
    assert isinstance(large["W2"], lora_jax.LoRAWeight)
    assert not any(
        isinstance(leaf, lora_jax.LoRAWeight)
        for leaf in lora_jax.merge(wrapped, targets=["W1", "W2"]).values()
    )


def test_some_layers_are_taken_out() -> None:
    wrapped = SCANNED.adapter(0, layers=(0, 2))
    merged = lora_jax.merge(wrapped)
    back = lora_jax.unmerge(merged, wrapped)
    assert_agree(back["W"].base, SCANNED.params["W"])
    np.testing.assert_array_equal(merged["W"][1], SCANNED.params["W"][1])


def test_weights_trained_in_full_come_back() -> None:
    wrapped = DENSE.adapter(0, train="b")
    back = lora_jax.unmerge(lora_jax.merge(wrapped), wrapped)
    np.testing.assert_array_equal(back["b"].value, wrapped["b"].value)
    assert back["b"].base is wrapped["b"].base
    assert isinstance(lora_jax.merge(wrapped, targets="W1")["b"], lora_jax.FullWeight)


def test_unmerge_needs_no_base() -> None:
    wrapped = DENSE.adapter(0)
    without = {
        name: dataclasses.replace(leaf, base=None) if name != "b" else leaf
        for name, leaf in wrapped.items()
    }
    back = lora_jax.unmerge(lora_jax.merge(wrapped), without)
    assert_agree(back["W1"].base, wrapped["W1"].base)


def test_both_compile() -> None:
    wrapped = DENSE.adapter(0)
    merged = jax.jit(lora_jax.merge)(wrapped)
    back = jax.jit(lora_jax.unmerge)(merged, wrapped)
    assert_agree(back["W1"].base, wrapped["W1"].base)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_nothing_but_the_change_is_held_beside_weight_and_result(dtype: Any) -> None:
    wrapped = lora_jax.wrap({"W": jnp.ones((256, 256), dtype)}, "W", rank=2, dora=True)
    memory = jax.jit(lora_jax.merge).lower(wrapped).compile().memory_analysis()
    change = 256 * 256 * 4
    assert memory.temp_size_in_bytes <= 1.01 * change


# --- errors ------------------------------------------------------------------------------------


def test_safe_looks_at_every_value() -> None:
    wrapped = DENSE.adapter(0)
    assert_agree(lora_jax.merge(wrapped, safe=True), lora_jax.merge(wrapped))
    node = wrapped["W2"]
    diverged = {
        **wrapped,
        "W2": dataclasses.replace(node, lora_B=node.lora_B.at[0, 3].set(jnp.inf)),
    }
    with pytest.raises(ValueError, match="`wrapped` merges to .* not finite at 'W2'; nothing is"):
        lora_jax.merge(diverged, safe=True)
    lora_jax.merge(diverged, targets="W1", safe=True)
    with pytest.raises(ValueError, match="`safe` is True, but the values are traced"):
        jax.jit(lambda tree: lora_jax.merge(tree, safe=True))(wrapped)


def test_safe_sees_what_overflows_in_the_cast() -> None:
    params = {"W": jnp.full((4, 3), 6e4, jnp.float16)}
    wrapped = lora_jax.wrap(params, "W", rank=1)
    node = wrapped["W"]
    large = {
        "W": dataclasses.replace(
            node, lora_A=jnp.ones_like(node.lora_A), lora_B=jnp.full_like(node.lora_B, 1e4)
        )
    }
    assert np.all(np.isinf(np.asarray(lora_jax.merge(large)["W"])))
    with pytest.raises(ValueError, match="not finite at 'W'"):
        lora_jax.merge(large, safe=True)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("W3", "'W3' matches no leaf"),
        ("b", "none of these is an adapted weight"),
        ({"W1": {"rank": 2}}, "`targets` overrides 'rank' for 'W1'; what is merged"),
    ],
    ids=str,
)
def test_targets_that_merge_nothing(targets: Any, message: str) -> None:
    wrapped = DENSE.adapter(0)
    with pytest.raises(ValueError, match=message):
        lora_jax.merge(wrapped, targets=targets)
    with pytest.raises(ValueError, match=message):
        lora_jax.unmerge(lora_jax.merge(wrapped), wrapped, targets=targets)


def test_what_can_not_be_taken_out() -> None:
    wrapped, dora = DENSE.adapter(0), DENSE.adapter(0, dora=True)
    with pytest.raises(ValueError, match=r"'W1' has a magnitude \(DoRA\).*unwrap\(wrapped\)"):
        lora_jax.unmerge(lora_jax.merge(dora), dora)
    with pytest.raises(ValueError, match="`merged` has a different structure from `wrapped`"):
        lora_jax.unmerge({"W1": DENSE.params["W1"]}, wrapped)
    with pytest.raises(ValueError, match=r"`merged` has the shape \(9, 8\) at 'W1'"):
        lora_jax.unmerge({**DENSE.params, "W1": DENSE.params["W2"]}, wrapped)
    with pytest.raises(ValueError, match="`wrapped` has no adapters"):
        lora_jax.unmerge(DENSE.params, DENSE.params)


def test_a_stack_has_no_one_merge() -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0)] * 2)
    with pytest.raises(ValueError, match="'W1' holds 2 adapters; expected one"):
        lora_jax.merge(bank)
    with pytest.raises(ValueError, match="'W1' holds 2 adapters; expected one"):
        lora_jax.unmerge(DENSE.params, bank)


STACKED = {
    "merge": lora_jax.merge,
    "adapt": lambda tree: lora_jax.adapt(DENSE.fn)(tree, DENSE.x),
    "bank": lambda tree: lora_jax.serving.bank([tree]),
    "resize": lambda tree: lora_jax.arithmetic.resize(tree, 1),
    "unmerge": lambda tree: lora_jax.unmerge(DENSE.params, tree),
}


@pytest.mark.parametrize("function", STACKED.values(), ids=STACKED)
def test_factors_of_several_adapters_in_one_weight_are_refused(function: Any) -> None:
    """`jax.vmap` and trees of earlier versions make them."""
    adapters = [lora_jax.split(DENSE.adapter(seed))[0] for seed in range(3)]
    frozen = lora_jax.split(DENSE.adapter(0))[1]
    stacked = lora_jax.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters), frozen)
    with pytest.raises(ValueError, match=r"'W1' has a lora_B of shape \(3, .*serving.bank"):
        function(stacked)
