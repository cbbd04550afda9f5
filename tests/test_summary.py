"""Counts and the table, with numbers worked out by hand."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax

MLP_SIZES = (784, 1000, 2000, 10)


def mlp_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    return {
        f"dense_{i}": {"kernel": jnp.zeros((n_in, n_out), dtype), "bias": jnp.zeros(n_out, dtype)}
        for i, (n_in, n_out) in enumerate(itertools.pairwise(MLP_SIZES))
    }


def wrapped_mlp(**options: Any) -> Any:
    return lora_jax.wrap(mlp_params(), "kernel", rank=1, **options)


def test_the_counts_of_the_mnist_network() -> None:
    counts = lora_jax.count_parameters(wrapped_mlp())
    assert counts == lora_jax.ParameterCounts(
        original=2_807_010,
        added=6_794,
        trainable=6_794,
        total=2_813_804,
        trainable_bytes=6_794 * 4,
        total_bytes=2_813_804 * 4,
    )
    assert f"{counts.percent:.3f}" == "0.242"


def test_the_table_of_the_mnist_network() -> None:
    text = lora_jax.summary(wrapped_mlp(alpha=0.5))
    rows = [line.split() for line in text.splitlines()]
    assert rows[2:5] == [
        ["dense_0/kernel", "(784,", "1000)", "in,", "out", "1", "0.5", "float32", "1,784"],
        ["dense_1/kernel", "(1000,", "2000)", "in,", "out", "1", "0.5", "float32", "3,000"],
        ["dense_2/kernel", "(2000,", "10)", "in,", "out", "1", "0.5", "float32", "2,010"],
    ]
    for part in ("2,807,010", "6,794 added", "2,813,804", "0.242 %", "27.2 kB of 11.3 MB"):
        assert part in rows[-1] or part in text.splitlines()[-1]


def test_weights_trained_in_full_count_as_trainable() -> None:
    counts = lora_jax.count_parameters(wrapped_mlp(train="dense_2/bias"))
    assert (counts.added, counts.trainable, counts.total) == (6_794, 6_804, 2_813_804)
    assert "full" in lora_jax.summary(wrapped_mlp(train="dense_2/bias"))


def test_bytes_follow_the_dtypes() -> None:
    params = {"kernel": jnp.zeros((40, 30), jnp.bfloat16)}
    counts = lora_jax.count_parameters(lora_jax.wrap(params, "kernel", rank=2))
    assert (counts.trainable_bytes, counts.total_bytes) == (2 * 70 * 4, 1200 * 2 + 2 * 70 * 4)


def test_an_abstract_tree_gives_the_same_numbers() -> None:
    abstract = jax.eval_shape(wrapped_mlp)
    assert isinstance(abstract["dense_0"]["kernel"].base, jax.ShapeDtypeStruct)
    assert lora_jax.count_parameters(abstract) == lora_jax.count_parameters(wrapped_mlp())
    assert "1,784" in lora_jax.summary(abstract)


def test_summary_while_tracing() -> None:
    texts = []
    jax.jit(lambda w: texts.append(lora_jax.summary(w)))(wrapped_mlp())
    assert "6,794 added" in texts[0]


def test_leaves_that_are_no_arrays_count_nothing() -> None:
    params = {"kernel": jnp.ones((4, 3)), "epsilon": 1e-3, "none": None, "name": 3}
    counts = lora_jax.count_parameters(lora_jax.wrap(params, "kernel", rank=1))
    assert (counts.original, counts.added) == (12, 7)


@pytest.mark.parametrize("shape", [(4, 3), (3, 40)])
def test_a_rank_as_large_as_a_side_is_marked(shape: tuple[int, int]) -> None:
    params = {"kernel": jnp.ones(shape)}
    assert "3 (whole side)" in lora_jax.summary(lora_jax.wrap(params, "kernel", rank=3))
    assert "whole side" not in lora_jax.summary(lora_jax.wrap(params, "kernel", rank=2))


@pytest.mark.parametrize("tree", [{}, None, [], {"a": None}, {"a": jnp.zeros((0, 3))}], ids=str)
def test_a_tree_without_numbers(tree: Any) -> None:
    counts = lora_jax.count_parameters(tree)
    assert (counts.original, counts.total, counts.percent) == (0, 0, 0.0)
    assert "0 original, 0 added, 0 together; 0 train (0.000 %)" in lora_jax.summary(tree)
