"""`extract`: adapters of a model that was fine-tuned in full."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.arrays import random


def params() -> dict[str, Any]:
    return {
        "dense": {"kernel": random(8, 6), "bias": jnp.zeros(6)},
        "stack": random(2, 8, 6, seed=1),
        "steps": jnp.arange(3),
    }


STACK = {"stack": ("batch", "in", "out")}


def tuned(rank: int) -> dict[str, Any]:
    """Returns params whose two weights differ by matrices of this rank."""
    change = random(8, rank, seed=2) @ random(rank, 6, seed=3)
    changed = params()
    changed["dense"]["kernel"] += change
    changed["stack"] = changed["stack"].at[0].add(change).at[1].add(-2 * change)
    return changed


@pytest.mark.parametrize("how", [{"rank": 3}, {"energy": 0.99999}])
def test_a_change_of_low_rank_is_found(how: dict[str, Any]) -> None:
    wrapped = lora_jax.arithmetic.extract(params(), tuned(3), "dense|stack", axes=STACK, **how)
    assert (wrapped["dense"]["kernel"].rank, wrapped["stack"].rank) == (3, 3)
    jax.tree.map(
        assert_agree,
        lora_jax.merge(wrapped),
        tuned(3),
    )
    assert lora_jax.unwrap(wrapped)["stack"].tolist() == params()["stack"].tolist()


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_energy_is_the_share_that_is_kept(energy: float) -> None:
    after = params()
    after["dense"]["kernel"] = random(8, 6, seed=9)
    wrapped = lora_jax.arithmetic.extract(params(), after, "dense", energy=energy)
    change = np.asarray(after["dense"]["kernel"] - params()["dense"]["kernel"], np.float64)
    energies = np.linalg.svd(change, compute_uv=False) ** 2
    shares = np.cumsum(energies) / energies.sum()
    rank = wrapped["dense"]["kernel"].rank
    assert shares[rank - 1] >= energy - 1e-6
    assert rank == 1 or shares[rank - 2] < energy


def test_a_mapping_gives_ranks() -> None:
    targets = {"dense": {"rank": 2, "dtype": jnp.bfloat16}, "stack": {}}
    wrapped = lora_jax.arithmetic.extract(params(), tuned(3), targets, rank=3, axes=STACK)
    assert (wrapped["dense"]["kernel"].rank, wrapped["stack"].rank) == (2, 3)
    assert wrapped["dense"]["kernel"].lora_A.dtype == jnp.bfloat16


def test_other_leaves_are_kept_in_full() -> None:
    after = tuned(1)
    after["dense"]["bias"] = jnp.ones(6)
    with pytest.raises(ValueError, match="differs.*'dense/bias'.*train="):
        lora_jax.arithmetic.extract(params(), after, "dense/kernel|stack", rank=1, axes=STACK)
    wrapped = lora_jax.arithmetic.extract(
        params(), after, "dense/kernel|stack", rank=1, axes=STACK, train="dense/bias"
    )
    assert lora_jax.merge(wrapped)["dense"]["bias"].tolist() == [1] * 6
    assert lora_jax.unwrap(wrapped)["dense"]["bias"].tolist() == [0] * 6


def test_no_change_is_an_adapter_that_does_nothing() -> None:
    wrapped = lora_jax.arithmetic.extract(params(), params(), "dense", energy=0.9)
    assert wrapped["dense"]["kernel"].rank == 1
    np.testing.assert_array_equal(
        lora_jax.merge(wrapped)["dense"]["kernel"], params()["dense"]["kernel"]
    )


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda tree: tree, {}, "`rank` is None and `energy` is None"),
        (lambda tree: tree, {"rank": 1, "energy": 0.5}, "`rank` is 1 and `energy` is 0.5"),
        (lambda tree: tree, {"energy": 0.0}, "`energy` is 0.0"),
        (lambda tree: {**tree, "more": 1}, {"rank": 1}, "`tuned` has a different structure"),
        (lambda tree: {**tree, "steps": jnp.arange(4)}, {"rank": 1}, r"shape \(4,\) at 'steps'"),
    ],
)
def test_refuses(change: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_jax.arithmetic.extract(params(), change(params()), "dense", **options)


@pytest.mark.parametrize(
    ("override", "options"),
    [
        ({"dora": True}, {"rank": 1}),
        ({"init": "pissa"}, {"rank": 1}),
        ({"rank": 2}, {"energy": 0.9}),
    ],
)
def test_refuses_other_settings(override: dict[str, Any], options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="`targets` overrides .* for 'dense'; expected nothing but"
    ):
        lora_jax.arithmetic.extract(
            params(), tuned(1), {"dense": override}, train="stack", **options
        )


def test_a_weight_that_did_not_change_can_still_train() -> None:
    wrapped = lora_jax.arithmetic.extract(params(), params(), "dense", rank=2)
    node = wrapped["dense"]["kernel"]
    assert np.all(np.any(np.asarray(node.lora_A), axis=0))
    assert not np.any(np.asarray(node.lora_B))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize("tuned_dtype", ["bfloat16", "float32", "numpy"])
def test_every_leaf_keeps_the_dtype_of_the_params(dtype: str, tuned_dtype: str) -> None:
    before = {"kernel": random(8, 6).astype(dtype), "bias": jnp.zeros(6, dtype)}
    after = {"kernel": random(8, 6, seed=1), "bias": jnp.linspace(0, 1, 6)}
    as_numpy = tuned_dtype == "numpy"
    after = {
        name: np.asarray(leaf) if as_numpy else leaf.astype(tuned_dtype)
        for name, leaf in after.items()
    }
    train = "bias" if dtype != "float8_e4m3fn" else None
    after = after if train else {**after, "bias": before["bias"]}
    wrapped = lora_jax.arithmetic.extract(before, after, "kernel", rank=6, train=train)
    merged = lora_jax.merge(wrapped)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
    for name in merged:
        expected = jnp.asarray(after[name]).astype(dtype).astype(jnp.float32)
        tolerance = 2 * float(jnp.finfo(dtype).eps) + 1e-5
        assert_agree(merged[name].astype(jnp.float32), expected, tolerance=tolerance)


def test_random_keys_among_the_params() -> None:
    before = {"kernel": random(8, 6), "key": jax.random.key(0)}
    after = {"kernel": random(8, 6, seed=1), "key": jax.random.key(0)}
    assert lora_jax.arithmetic.extract(before, after, "kernel", rank=6)["kernel"].rank == 6
    with pytest.raises(ValueError, match="differs from `params` at 'key'"):
        lora_jax.arithmetic.extract(before, {**after, "key": jax.random.key(1)}, "kernel", rank=6)
