"""Adding, removing and replacing adapters: right numbers, and nothing is compiled again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.serving.models import BATCH, DENSE, MODELS, SCANNED, Model, one_by_one


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_changing_a_bank_compiles_nothing_again(model: Model, options: dict[str, Any]) -> None:
    traces = []

    def fn(params: Any, x: jax.Array) -> jax.Array:
        traces.append(x.shape)
        return model.fn(params, x)

    serve = jax.jit(lora_jax.serving.adapt(fn))
    wrappeds = [model.adapter(seed, rank=1 + seed % 2, **options) for seed in range(4)]
    ids = jnp.array([0, 1, 2, 2, 1, 0, -1])

    def check(bank: Any, *held: Any) -> None:
        actual = serve(bank, ids, model.x)
        expected = one_by_one(model, [held[place] for place in ids], model.x)
        assert_agree(actual, expected)

    base = model.params
    bank = lora_jax.serving.bank([wrappeds[0]], capacity=3, rank=2)
    check(bank, wrappeds[0], base, base, base)
    bank, first = lora_jax.serving.add(bank, wrappeds[1])
    bank, second = lora_jax.serving.add(bank, wrappeds[2])
    assert (first, second) == (1, 2)
    check(bank, *wrappeds[:3], base)
    removed = lora_jax.serving.remove(bank, 1)
    assert lora_jax.serving.ids(removed) == (0, 2)
    check(removed, wrappeds[0], base, wrappeds[2], base)
    check(
        lora_jax.serving.replace(bank, wrappeds[3], adapter_id=0), wrappeds[3], *wrappeds[1:3], base
    )
    again, place = lora_jax.serving.add(removed, wrappeds[3])
    assert place == 1
    check(again, wrappeds[0], wrappeds[3], wrappeds[2], base)
    check(bank, *wrappeds[:3], base)
    assert len(traces) == 1
    assert serve._cache_size() == 1


@pytest.mark.parametrize("dora", [False, True])
def test_a_replaced_adapter_is_as_if_it_had_been_stacked(dora: bool) -> None:
    wrappeds = [SCANNED.adapter(seed, dora=dora) for seed in range(3)]
    bank = lora_jax.serving.bank(wrappeds[:2])
    replaced = lora_jax.serving.replace(bank, wrappeds[2], adapter_id=0)
    expected = lora_jax.serving.bank([wrappeds[2], wrappeds[1]])
    assert jax.tree.structure(replaced) == jax.tree.structure(expected)
    assert_agree(replaced, expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_of_a_changed_base_is_put_on_the_original(init: str) -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0)], capacity=2, rank=4)
    wrapped = DENSE.adapter(1, init=init)
    bank, _ = lora_jax.serving.add(bank, wrapped)
    actual = lora_jax.serving.adapt(DENSE.fn)(bank, [1] * BATCH, DENSE.x)
    expected = one_by_one(DENSE, [wrapped] * BATCH, DENSE.x)
    assert_agree(actual, expected)


def test_replacing_under_jit_compiles_once_for_all_places() -> None:
    traces = []

    def replace(bank: Any, wrapped: Any, place: jax.Array) -> Any:
        traces.append(1)
        return lora_jax.serving.replace(bank, wrapped, adapter_id=place)

    compiled = jax.jit(replace)
    bank = lora_jax.serving.bank([DENSE.adapter(0)], capacity=3)
    for place in range(3):
        replaced = compiled(bank, DENSE.adapter(1), place)
        np.testing.assert_array_equal(replaced["W1"].lora_B[place], DENSE.adapter(1)["W1"].lora_B)
    for place in (-1, 3):
        unchanged = compiled(bank, DENSE.adapter(1), place)
        jax.tree.map(np.testing.assert_array_equal, unchanged, bank)
    assert len(traces) == 1


def test_a_switched_off_adapter_keeps_its_place() -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0), DENSE.adapter(1)])
    off = {
        name: dataclasses.replace(leaf, scale=leaf.scale.at[1].set(0)) if name != "b" else leaf
        for name, leaf in bank.items()
    }
    assert lora_jax.serving.ids(off) == (0, 1)
    actual = lora_jax.serving.adapt(DENSE.fn)(off, [1] * BATCH, DENSE.x)
    assert_agree(actual, DENSE.fn(DENSE.params, DENSE.x))


# --- errors ------------------------------------------------------------------------------------


def test_a_full_bank() -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0), DENSE.adapter(1)])
    with pytest.raises(ValueError, match=r"`bank` is full: all of its 2 slots .*serving.remove"):
        lora_jax.serving.add(bank, DENSE.adapter(2))


REFUSED = {
    "a larger rank": (
        lambda: DENSE.adapter(1, rank=3),
        r"`wrapped` has the rank 3 at 'W1', and `bank` has room for 2; .*rank=3",
    ),
    "a rank that a changed base doubles": (
        lambda: DENSE.adapter(1, init="pissa"),
        "rank 4 at 'W1'.* room for 2",
    ),
    "another base": (
        lambda: lora_jax.wrap({**DENSE.params, "W2": DENSE.params["W2"] * 2}, "W.*", rank=2),
        "`wrapped` has another base than `bank` at 'W2'",
    ),
    "other targets": (
        lambda: lora_jax.wrap(DENSE.params, "W1", rank=2),
        "`bank` has an adapter at 'W2', and `wrapped` has none",
    ),
    "magnitudes": (lambda: DENSE.adapter(1, dora=True), r"`wrapped` has a magnitude \(DoRA\)"),
    "not a number": (
        lambda: jax.tree.map(lambda leaf: leaf * jnp.nan, DENSE.adapter(1)),
        "`wrapped` holds values that are not finite at 'W1/lora_A'",
    ),
    "plain params": (lambda: DENSE.params, "`wrapped` has no adapters"),
}


@pytest.mark.parametrize(("other", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_fit_is_refused_and_changes_nothing(other: Any, message: str) -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0)], capacity=2)
    before = jax.tree.map(np.asarray, bank)
    with pytest.raises(ValueError, match=message):
        lora_jax.serving.replace(bank, other(), adapter_id=1)
    with pytest.raises(ValueError, match=message):
        lora_jax.serving.add(bank, other())
    jax.tree.map(np.testing.assert_array_equal, bank, before)


def test_dtypes_that_a_bank_does_not_hold() -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0, dtype=jnp.bfloat16)], capacity=2)
    with pytest.raises(ValueError, match="float32 at 'W1/lora_A', and `bank` bfloat16"):
        lora_jax.serving.add(bank, DENSE.adapter(1))


def test_layers_that_a_bank_has_no_room_for() -> None:
    bank = lora_jax.serving.bank([SCANNED.adapter(0, layers=(0, 1))], capacity=3)
    with pytest.raises(ValueError, match=r"layers \(2,\) at 'W', .*room for \(0, 1\)"):
        lora_jax.serving.add(bank, SCANNED.adapter(1, layers=(2,)))
    with pytest.raises(ValueError, match="layers all at 'W'"):
        lora_jax.serving.add(bank, SCANNED.adapter(1))
    bank, _ = lora_jax.serving.add(bank, SCANNED.adapter(1, layers=(1,)))
    assert not np.any(bank["W"].lora_B[1, 0])


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda bank, w: lora_jax.serving.replace(bank, w, adapter_id=2),
            ValueError,
            "from 0 to 1",
        ),
        (lambda bank, w: lora_jax.serving.replace(bank, w, adapter_id=-1), ValueError, "is -1"),
        (lambda bank, w: lora_jax.serving.replace(bank, w, adapter_id="a"), TypeError, "is 'a'"),
        (lambda bank, w: lora_jax.serving.remove(bank, -1), ValueError, "`adapter_id` is -1"),
        (lambda bank, w: lora_jax.serving.remove(bank, 1), ValueError, "no adapter with the id 1"),
        (lambda bank, w: lora_jax.serving.remove(w, 0), ValueError, "is not a bank"),
        (lambda bank, w: lora_jax.serving.add(w, w), ValueError, "is not a bank"),
    ],
)
def test_places_that_do_not_exist(change: Any, error: Any, message: str) -> None:
    wrapped = DENSE.adapter(0)
    with pytest.raises(error, match=message):
        change(lora_jax.serving.bank([wrapped], capacity=2), wrapped)
