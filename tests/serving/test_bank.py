"""`bank` and `select`: what is shared, what is filled up, and what does not belong together."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.checkpoint import TrainingCheckpoints
from tests.agreement import assert_agree, assert_identical
from tests.checkpoint.trees import edit_json
from tests.serving.models import BATCH, DENSE, HEADS, MODELS, SCANNED, Model, dense, merged


def test_ranks_are_filled_up_and_scales_are_kept() -> None:
    wrappeds = [HEADS.adapter(0, rank=1), HEADS.adapter(1, rank=3, rslora=True)]
    bank = lora_jax.serving.bank(wrappeds)
    node = bank["W1"]
    assert (node.lora_A.shape, node.lora_B.shape) == ((2, 12, 3), (2, 3, 3, 4))
    assert_agree(node.scale, np.array([3.0, 3.0 / 3**0.5]))
    np.testing.assert_array_equal(node.lora_A[0, :, :1], wrappeds[0]["W1"].lora_A)
    assert not np.any(node.lora_A[0, :, 1:])
    assert not np.any(node.lora_B[0, 1:])
    assert node.base is HEADS.params["W1"]
    assert isinstance(node, lora_jax.LoRABank)
    assert node.capacity == len(wrappeds)


def test_a_bank_has_room_for_more() -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0)], capacity=4, rank=6)
    assert bank["W1"].lora_A.shape == (4, 12, 6)
    assert bank["W1"].scale.tolist() == [1.5, 0, 0, 0]
    assert bank["b"] is DENSE.params["b"]
    assert lora_jax.serving.ids(bank) == (0,)


def test_factors_get_the_dtype_that_holds_all() -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0, dtype=jnp.bfloat16), DENSE.adapter(1)])
    assert bank["W1"].lora_A.dtype == jnp.float32
    bank = lora_jax.serving.bank([DENSE.adapter(0, dtype=jnp.bfloat16)] * 2)
    assert bank["W1"].lora_A.dtype == jnp.bfloat16


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_selected_adapters_compute_what_they_did(model: Model, options: dict[str, Any]) -> None:
    wrappeds = [model.adapter(seed, rank=seed + 1, **options) for seed in range(2)]
    bank = lora_jax.serving.bank(wrappeds, capacity=3)
    for place, wrapped in enumerate([*wrappeds, model.params]):
        adapter_id = -1 if place == 2 else place
        selected = lora_jax.serving.select(bank, adapter_id)
        expected = dense(wrapped)
        for name, leaf in merged(selected).items():
            assert_agree(leaf, expected[name])
            # Not one whose norm is fixed: it may train.
            assert not hasattr(selected[name], "norm")


def test_a_selected_adapter_trains_like_an_ordinary_one() -> None:
    wrapped = DENSE.adapter(0, dora=True)
    selected = lora_jax.serving.select(lora_jax.serving.bank([wrapped]), 0)
    assert jax.tree.structure(selected) == jax.tree.structure(wrapped)
    loss = lambda tree: jnp.sum(lora_jax.adapt(DENSE.fn)(tree, DENSE.x) ** 2)  # noqa: E731
    for name in ("W1", "W2"):
        actual, expected = (jax.jit(jax.grad(loss))(tree)[name] for tree in (selected, wrapped))
        for leaf in ("lora_A", "lora_B", "magnitude"):
            assert_agree(getattr(actual, leaf), getattr(expected, leaf), tolerance=1e-4)


def test_select_takes_a_traced_id() -> None:
    wrappeds = [DENSE.adapter(seed) for seed in range(2)]
    bank = lora_jax.serving.bank(wrappeds)
    merged = jax.jit(lambda bank, place: lora_jax.merge(lora_jax.serving.select(bank, place)))
    for place, expected in ((0, wrappeds[0]), (1, wrappeds[1]), (2, DENSE.params)):
        assert_agree(merged(bank, place)["W1"], lora_jax.merge(expected)["W1"])


def test_what_does_not_train_is_kept_where_all_agree() -> None:
    frozen, other = DENSE.adapter(0, freeze="lora_A"), DENSE.adapter(1)
    assert lora_jax.serving.bank([frozen, frozen])["W1"].frozen == ("lora_A",)
    assert lora_jax.serving.bank([frozen, other])["W1"].frozen == ()


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=str)
def test_a_stack_is_saved_and_restored_exactly(tmp_path: Any, options: dict[str, Any]) -> None:
    bank = lora_jax.serving.bank(
        [SCANNED.adapter(seed, **options) for seed in range(2)], capacity=3
    )
    lora_jax.save(tmp_path / "stack", bank)
    restored = lora_jax.restore(tmp_path / "stack", SCANNED.params)
    assert jax.tree.structure(restored) == jax.tree.structure(bank)
    jax.tree.map(np.testing.assert_array_equal, restored, bank)
    assert lora_jax.serving.ids(restored) == (0, 1)


def test_the_summary_of_a_stack_says_what_it_can() -> None:
    assert "W1" in lora_jax.summary(lora_jax.serving.bank([DENSE.adapter(0)] * 2))


# --- errors ------------------------------------------------------------------------------------


def changed(wrapped: Any, path: str, **leaves: Any) -> Any:
    return {**wrapped, path: dataclasses.replace(wrapped[path], **leaves)}


def other_params() -> dict[str, jax.Array]:
    return {**DENSE.params, "W1": DENSE.params["W1"] + 1}


REFUSED = {
    "another base": (
        lambda: lora_jax.wrap(other_params(), "W.*", rank=2),
        r"`adapters\[1\]` has another base than `adapters\[0\]` at 'W1'.*same `params`",
    ),
    "another base that was changed": (
        lambda: lora_jax.wrap(other_params(), "W.*", rank=2, init="pissa"),
        "another base .* at 'W1'",
    ),
    "another bias": (
        lambda: {**DENSE.adapter(1), "b": DENSE.params["b"] + 1},
        "another base .* at 'b'",
    ),
    "other targets": (
        lambda: lora_jax.wrap(DENSE.params, "W1", rank=2),
        r"`adapters\[0\]` has an adapter at 'W2', and `adapters\[1\]` has none; .*same targets",
    ),
    "other axes": (
        lambda: lora_jax.wrap(DENSE.params, "W.*", rank=2, axes={"W1": ("out", "in")}),
        r"has the axes \('out', 'in'\) at 'W1', and `adapters\[0\]` \('in', 'out'\)",
    ),
    "another model": (lambda: HEADS.adapter(1), "a different structure"),
    "magnitudes": (
        lambda: DENSE.adapter(1, dora=True),
        r"`adapters\[1\]` has a magnitude \(DoRA\) at 'W1', and `adapters\[0\]` has none",
    ),
    "weights trained in full": (
        lambda: DENSE.adapter(1, train="b"),
        r"`adapters\[1\]` trains 'b' in full; .*Wrap without `train`",
    ),
    "no adapters": (lambda: DENSE.params, r"`adapters\[1\]` has no adapters"),
    "not a number": (
        lambda: changed(DENSE.adapter(1), "W2", lora_B=jnp.full((2, 8), jnp.nan)),
        r"`adapters\[1\]` holds values that are not finite at 'W2/lora_B'",
    ),
    "an infinite scale": (
        lambda: changed(DENSE.adapter(1), "W2", scale=jnp.array(jnp.inf)),
        "not finite at 'W2/scale'",
    ),
    "a stack": (
        lambda: lora_jax.serving.bank([DENSE.adapter(1)] * 2),
        "'W1' holds 2 adapters; expected one",
    ),
}


@pytest.mark.parametrize(("other", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_can_not_be_stacked(other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        lora_jax.serving.bank([DENSE.adapter(0), other()])


def test_bases_of_equal_values_are_one() -> None:
    copies = jax.tree.map(jnp.copy, DENSE.params)
    bank = lora_jax.serving.bank([DENSE.adapter(0), lora_jax.wrap(copies, "W.*", rank=2)])
    assert bank["W1"].base is DENSE.params["W1"]


def test_bases_that_hold_nan_are_still_one() -> None:
    params = {"W": jnp.full((4, 3), jnp.nan)}
    copies = jax.tree.map(jnp.copy, params)
    lora_jax.serving.bank([lora_jax.wrap(tree, "W", rank=1) for tree in (params, copies)])


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ("one tree", {}, TypeError, "`adapters` is a dict; expected a list"),
        ("none", {}, TypeError, "at least one tree"),
        ("two", {"capacity": 1}, ValueError, "`capacity` is 1, and there are 2 adapters"),
        ("two", {"capacity": 2.0}, TypeError, "`capacity` is 2.0"),
        ("two", {"rank": 1}, ValueError, r"`rank` is 1, .* rank 2 at 'W1'; .*rank=2\)"),
        ("two", {"rank": 1.5}, TypeError, "`rank` is 1.5"),
    ],
)
def test_arguments_of_stack(arguments: str, options: Any, error: Any, message: str) -> None:
    wrapped = DENSE.adapter(0)
    adapters = {"one tree": wrapped, "none": [], "two": [wrapped, wrapped]}[arguments]
    with pytest.raises(error, match=message):
        lora_jax.serving.bank(adapters, **options)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("adapter_id", "error", "message"),
    [
        (1, ValueError, r"no adapter with the id 1; expected one of 0, or -1"),
        (-2, ValueError, "no adapter with the id -2"),
        (True, TypeError, "`adapter_id` is True"),
        (0.0, TypeError, "`adapter_id` is 0.0"),
    ],
)
def test_ids_that_select_nothing(adapter_id: Any, error: Any, message: str) -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0)], capacity=2)
    with pytest.raises(error, match=message):
        lora_jax.serving.select(bank, adapter_id)


def test_a_traced_stack_has_no_list_of_ids() -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0)])
    with pytest.raises(ValueError, match="`bank` is traced"):
        jax.jit(lora_jax.serving.ids)(bank)
    serve = jax.jit(lambda bank: lora_jax.serving.adapt(DENSE.fn)(bank, [9] * BATCH, DENSE.x))
    with pytest.raises(ValueError, match="no adapter with the id 9"):
        serve(bank)


def test_a_traced_function_may_hold_the_adapters() -> None:
    wrappeds = [DENSE.adapter(0), DENSE.adapter(1, init="pissa")]
    serve = lora_jax.serving.adapt(DENSE.fn)

    def apply(x: jax.Array) -> jax.Array:
        bank = lora_jax.serving.bank([wrappeds[0], wrappeds[0]], capacity=3)
        return serve(lora_jax.serving.replace(bank, wrappeds[0], adapter_id=2), [2] * BATCH, x)

    expected = serve(lora_jax.serving.bank(wrappeds), [0] * BATCH, DENSE.x)
    assert_agree(jax.jit(apply)(DENSE.x), expected)
    other = REFUSED["another base"][0]()
    with pytest.raises(ValueError, match="another base"):
        jax.jit(lambda: lora_jax.serving.bank([wrappeds[0], other]))()


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=str)
def test_a_stack_of_an_earlier_version_is_restored_as_a_bank(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Such versions called it a LoRAWeight."""
    bank = lora_jax.serving.bank([DENSE.adapter(seed, **options) for seed in range(2)], capacity=3)
    lora_jax.save(tmp_path / "adapters", bank)
    edit_json(tmp_path / "adapters" / "adapters.json", _with_earlier_kinds)
    assert_identical(lora_jax.restore(tmp_path / "adapters", DENSE.params), bank)
    with TrainingCheckpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, bank, 0)
    (description,) = (tmp_path / "run").rglob("training.json")
    edit_json(description, _with_earlier_kinds)
    with TrainingCheckpoints(tmp_path / "run") as checkpoints:
        assert_identical(checkpoints.restore(bank, 0).wrapped, bank)


def _with_earlier_kinds(content: dict[str, Any]) -> None:
    for weight in content["weights"].values():
        assert weight["kind"] == "LoRABank"
        weight["kind"] = "LoRAWeight"
