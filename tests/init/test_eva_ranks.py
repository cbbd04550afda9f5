"""Ranks that EVA shares out among the weights."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax


def moments_with_variances(*variances: list[float], count: int = 100) -> lora_jax.init.InputMoments:
    second = count * np.stack([np.diag(row) for row in variances])
    return lora_jax.init.InputMoments(
        jnp.asarray(second, jnp.float32), jnp.zeros(second.shape[:2]), jnp.asarray(count)
    )


def test_ranks_go_where_they_explain_the_most() -> None:
    moments = {
        "flat": moments_with_variances([1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        "steep": moments_with_variances([90.0, 5.0, 3.0, 1.0, 0.5, 0.5]),
        "middle": moments_with_variances([6.0, 5.0, 4.0, 0.1, 0.1, 0.1]),
    }
    # Shares: flat 1/6 each; steep 0.9, 0.05, ...; middle 0.39, 0.33, 0.26, 0.01.
    assert lora_jax.init.eva_ranks(moments, rank=2) == {
        "^flat$": {"rank": 2},
        "^steep$": {"rank": 1},
        "^middle$": {"rank": 3},
    }
    assert lora_jax.init.eva_ranks(moments, rank=2, rho=1.0) == {
        f"^{name}$": {"rank": 2} for name in moments
    }
    assert lora_jax.init.eva_ranks(moments, rank=1, rho=3.0) == {
        "^steep$": {"rank": 1},
        "^middle$": {"rank": 2},
    }
    assert lora_jax.init.eva_ranks(moments, rank=2, alpha=6.0)["^middle$"] == {
        "rank": 3,
        "alpha": 9.0,
    }


def test_stacked_matrices_share_a_rank_and_pay_for_each() -> None:
    moments = {
        "stack": moments_with_variances([55.0, 40.0, 5.0], [45.0, 50.0, 5.0]),
        "single": moments_with_variances([60.0, 20.0, 20.0]),
        "other": moments_with_variances([40.0, 30.0, 30.0]),
    }
    # In descending order: single 0.6 (1 of the budget of 4), stack 0.525 (2), stack 0.425 (2, of
    # which only 1 is left), ...
    assert lora_jax.init.eva_ranks(moments, rank=1) == {
        "^stack$": {"rank": 1},
        "^single$": {"rank": 1},
        "^other$": {"rank": 1},
    }


def test_shared_out_ranks_are_targets_of_those_paths_alone() -> None:
    leaf = jnp.ones((4, 4))
    params = {"a.b": {"kernel": leaf}, "block": {"a.b": {"kernel": leaf}}, "axb": {"kernel": leaf}}
    moments = {
        "a.b/kernel": moments_with_variances([5.0, 3.0, 1.0, 1.0]),
        "block/a.b/kernel": moments_with_variances([1.0, 1.0, 1.0, 1.0]),
        "axb/kernel": moments_with_variances([8.0, 1.0, 1.0, 0.0]),
    }
    targets = lora_jax.init.eva_ranks(moments, rank=1)
    wrapped = lora_jax.wrap(params, targets, init=lora_jax.init.eva(moments))
    assert wrapped["a.b"]["kernel"].rank == 2
    assert wrapped["axb"]["kernel"].rank == 1
    assert wrapped["block"]["a.b"]["kernel"] is leaf


@pytest.mark.parametrize(("name", "options"), [("rank", {"rank": 0}), ("rho", {"rho": 0.5})])
def test_ranks_that_cannot_be_shared_out_raise(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is"):
        lora_jax.init.eva_ranks({"kernel": moments_with_variances([1.0])}, **options)
