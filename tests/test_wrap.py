"""`wrap`, `merge` and `unwrap`: shapes, keys, dtypes and everything that is refused."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.arrays import random

KEY = jax.random.key(5)
SIZES = (4, 5, 6, 3)


def every_labelling(ndim: int) -> list[tuple[str, ...]]:
    labellings = itertools.product(("in", "out", "batch"), repeat=ndim)
    return [roles for roles in labellings if {"in", "out"} <= set(roles)]


LABELLINGS = [
    *every_labelling(2),
    *every_labelling(3),
    ("in", "in", "in", "out"),
    ("out", "in", "batch", "in"),
    ("batch", "out", "batch", "in"),
    ("in", "out", "batch", "out"),
    ("out", "batch", "in", "out"),
]


@functools.cache
def trained_node(axes: tuple[str, ...], rank: int, alpha: float | None = None) -> Any:
    params = {"kernel": random(*SIZES[: len(axes)])}
    node = lora_jax.wrap(params, "kernel", rank=rank, alpha=alpha, axes={"kernel": axes}, key=KEY)
    return {
        "kernel": lora_jax.LoRAWeight(
            base=node["kernel"].base,
            lora_A=node["kernel"].lora_A,
            lora_B=random(*node["kernel"].lora_B.shape, seed=1),
            scale=node["kernel"].scale,
            axes=axes,
        )
    }


@pytest.mark.parametrize("axes", LABELLINGS, ids="-".join)
def test_a_factor_holds_the_axes_that_it_depends_on(axes: tuple[str, ...]) -> None:
    node = trained_node(axes, rank=2)["kernel"]
    sizes = {
        role: [size for size, held in zip(SIZES, axes, strict=False) if held == role]
        for role in ("in", "out", "batch")
    }
    assert node.lora_A.shape == (*sizes["batch"], *sizes["in"], 2)
    assert node.lora_B.shape == (*sizes["batch"], 2, *sizes["out"])
    assert (node.rank, node.shape, node.dtype) == (2, SIZES[: len(axes)], jnp.float32)


@pytest.mark.parametrize("axes", LABELLINGS, ids="-".join)
def test_merge_is_the_sum_over_the_rank(axes: tuple[str, ...]) -> None:
    wrapped = trained_node(axes, rank=2, alpha=3.0)
    node = wrapped["kernel"]
    letters = dict(zip(range(len(axes)), "abcd", strict=False))
    batch, inputs, outputs = (
        "".join(letters[axis] for axis, held in enumerate(axes) if held == role)
        for role in ("batch", "in", "out")
    )
    A, B = (np.asarray(factor, np.float64) for factor in (node.lora_A, node.lora_B))
    change = np.einsum(f"{batch}{inputs}r,{batch}r{outputs}->{''.join(letters.values())}", A, B)
    expected = np.asarray(node.base, np.float64) + 1.5 * change
    assert_agree(lora_jax.merge(wrapped)["kernel"], expected)


# --- keys --------------------------------------------------------------------------------------


def stack_of_layers(**options: Any) -> Any:
    params = {f"layer_{i}": {"kernel": random(6, 6, seed=i)} for i in range(3)}
    return lora_jax.wrap(params, rank=2, **options)


def test_another_target_does_not_change_the_factors() -> None:
    one = stack_of_layers(targets="layer_1", key=KEY)
    all_ = stack_of_layers(targets="kernel", key=KEY)
    np.testing.assert_array_equal(one["layer_1"]["kernel"].lora_A, all_["layer_1"]["kernel"].lora_A)


def test_no_two_layers_share_factors() -> None:
    layers = stack_of_layers(targets="kernel", key=KEY)
    factors = [np.asarray(layers[f"layer_{i}"]["kernel"].lora_A) for i in range(3)]
    for first, second in itertools.combinations(factors, 2):
        assert not np.any(first == second)


def test_experts_have_factors_of_their_own() -> None:
    axes = {"kernel": ("batch", "in", "out")}
    node = lora_jax.wrap({"kernel": random(3, 6, 6)}, "kernel", rank=2, axes=axes)["kernel"]
    for first, second in itertools.combinations(np.asarray(node.lora_A), 2):
        assert not np.any(first == second)


@pytest.mark.parametrize("key", [None, KEY, jax.random.PRNGKey(3)], ids=["default", "key", "raw"])
def test_the_same_key_gives_the_same_factors(key: Any) -> None:
    first, second = (stack_of_layers(targets="kernel", key=key) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_another_key_gives_other_factors() -> None:
    first = stack_of_layers(targets="kernel", key=jax.random.key(1))["layer_0"]["kernel"]
    second = stack_of_layers(targets="kernel", key=jax.random.key(2))["layer_0"]["kernel"]
    assert not np.any(np.asarray(first.lora_A) == np.asarray(second.lora_A))


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "alpha", "scale"),
    [(4, None, 1.0), (4, 8, 2.0), (4, 1, 0.25), (np.int64(2), 3.0, 1.5), (1, np.float64(0.5), 0.5)],
)
def test_scale_is_alpha_over_rank(rank: Any, alpha: Any, scale: float) -> None:
    node = lora_jax.wrap({"kernel": random(6, 5)}, "kernel", rank=rank, alpha=alpha)["kernel"]
    assert float(node.scale) == scale
    assert node.scale.shape == ()
    assert node.rank == rank


@pytest.mark.parametrize(
    ("base", "dtype", "expected"),
    [
        (jnp.float32, None, jnp.float32),
        (jnp.bfloat16, None, jnp.float32),
        (jnp.float16, None, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, "bfloat16", jnp.bfloat16),
        (jnp.float32, np.dtype("float16"), jnp.float16),
    ],
)
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_dtype_of_the_factors(base: Any, dtype: Any, expected: Any, init: str) -> None:
    params = {"kernel": random(6, 5, dtype=base)}
    node = lora_jax.wrap(params, "kernel", rank=2, dtype=dtype, init=init)["kernel"]
    assert (node.lora_A.dtype, node.lora_B.dtype) == (expected, expected)
    assert node.base.dtype == base
    assert lora_jax.merge({"kernel": node})["kernel"].dtype == base


@pytest.mark.usefixtures("float64")
def test_a_float64_weight_has_float64_factors() -> None:
    params = {"kernel": jnp.ones((6, 5), jnp.float64)}
    node = lora_jax.wrap(params, "kernel", rank=2)["kernel"]
    assert node.lora_A.dtype == node.scale.dtype == jnp.float64


PARAMS = {
    "dense": {"kernel": random(8, 6), "bias": random(6)},
    "attention": {"kernel": random(8, 2, 4)},
}


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "`rank` is 0; expected a whole number of at least 1"),
        ({"rank": -3}, ValueError, "`rank` is -3"),
        ({"rank": True}, TypeError, "`rank` is True"),
        ({"rank": 2.0}, TypeError, "`rank` is 2.0"),
        ({"rank": "4"}, TypeError, "`rank` is '4'"),
        ({"rank": None}, TypeError, "`rank` is None"),
        ({"rank": 7}, ValueError, r"`rank` is 7 for 'dense/kernel'.*at most 6.*dict\(rank=6\)"),
        ({"alpha": 0}, ValueError, "`alpha` is 0; expected a positive"),
        ({"alpha": -1.0}, ValueError, "`alpha` is -1.0"),
        ({"alpha": float("nan")}, ValueError, "`alpha` is nan"),
        ({"alpha": float("inf")}, ValueError, "`alpha` is inf"),
        ({"alpha": "1"}, TypeError, "`alpha` is '1'"),
        ({"alpha": True}, TypeError, "`alpha` is True"),
        ({"dtype": jnp.int32}, TypeError, "`dtype` is.*int32.*floating-point"),
        ({"dtype": "nonsense"}, TypeError, "`dtype` is 'nonsense'"),
        ({"init": "kaimign"}, ValueError, "`init` is 'kaimign'.*'kaiming'"),
        ({"key": 0}, TypeError, "`key` is 0"),
        ({"axes": ("in", "out")}, TypeError, r"`axes` is \('in', 'out'\)"),
        ({"axes": {"dense": ("in", "up")}}, ValueError, "`axes` gives.*'up'.*one of 'in', 'out'"),
        ({"axes": {"dense": ("in",)}}, ValueError, "each of its 2 axes"),
        ({"axes": {"dense": ("in", "in")}}, ValueError, "one 'in' and one 'out'"),
        ({"axes": {"dense": ("batch", "out")}}, ValueError, "one 'in' and one 'out'"),
        ({"axes": {"dense(": ("in", "out")}}, ValueError, "`axes` holds.*regular expression"),
    ],
)
def test_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_jax.wrap(PARAMS, "dense", **{"rank": 2, **options})


def test_three_axes_need_a_word_on_what_they_are() -> None:
    with pytest.raises(ValueError, match=r"shape \(8, 2, 4\).*wrap\(\.\.\., axes=\{'attention"):
        lora_jax.wrap(PARAMS, "attention", rank=2)
    axes = {"attention": ("in", "out", "out")}
    assert lora_jax.wrap(PARAMS, "attention", rank=2, axes=axes)["attention"]["kernel"].rank == 2


def test_the_rank_is_held_to_the_sides_and_not_to_an_axis() -> None:
    axes = {"attention": ("in", "out", "out")}
    assert lora_jax.wrap(PARAMS, "attention", rank=8, axes=axes)["attention"]["kernel"].rank == 8


def test_wrapping_twice_raises() -> None:
    wrapped = lora_jax.wrap(PARAMS, "dense", rank=2)
    with pytest.raises(ValueError, match="wrapped already at 'dense/kernel'.*unwrap"):
        lora_jax.wrap(wrapped, "attention", rank=2)
    again = lora_jax.wrap(lora_jax.merge(wrapped), "dense", rank=2)
    assert again["dense"]["kernel"].rank == 2


# --- what stays as it is -----------------------------------------------------------------------


def test_nothing_frozen_is_copied() -> None:
    wrapped = lora_jax.wrap(PARAMS, "dense", rank=2)
    assert wrapped["dense"]["kernel"].base is PARAMS["dense"]["kernel"]
    assert wrapped["dense"]["bias"] is PARAMS["dense"]["bias"]
    assert wrapped["attention"]["kernel"] is PARAMS["attention"]["kernel"]


def test_a_weight_trained_in_full() -> None:
    wrapped = lora_jax.wrap(PARAMS, "dense", rank=2, train="bias")
    node = wrapped["dense"]["bias"]
    assert isinstance(node, lora_jax.FullWeight)
    assert node.base is PARAMS["dense"]["bias"]
    np.testing.assert_array_equal(node.value, node.base)
    changed = {"bias": lora_jax.FullWeight(base=node.base, value=node.value + 1)}
    np.testing.assert_array_equal(lora_jax.merge(changed)["bias"], node.base + 1)
    assert lora_jax.unwrap(changed)["bias"] is node.base


def test_the_trained_copy_is_a_copy() -> None:
    """A step that donates what trains must not take the frozen original with it."""
    params = {"kernel": random(6, 5), "bias": random(5)}
    wrapped = lora_jax.wrap(params, "kernel", rank=2, train="bias")
    adapters, frozen = lora_jax.split(wrapped)
    step = jax.jit(lambda adapters: jax.tree.map(lambda x: x + 1, adapters), donate_argnums=0)
    trained = lora_jax.combine(step(adapters), frozen)
    assert not params["bias"].is_deleted()
    np.testing.assert_array_equal(lora_jax.unwrap(trained)["bias"], random(5))


def test_the_whole_tree_can_be_donated() -> None:
    params = {"kernel": random(6, 5), "bias": random(5)}
    wrapped = lora_jax.wrap(params, "kernel", rank=2, train="bias")
    step = jax.jit(lambda wrapped: jax.tree.map(lambda x: x + 1, wrapped), donate_argnums=0)
    assert step(wrapped)["bias"].value.shape == (5,)


def containers() -> dict[str, Any]:
    import equinox as eqx
    import flax.core

    kernel = random(6, 5)
    return {
        "dict": {"a": kernel, "none": None},
        "list": [kernel, (kernel, kernel)],
        "frozen": flax.core.freeze({"a": {"b": kernel}}),
        "equinox": eqx.nn.Linear(5, 6, key=KEY),
        "bare": kernel,
    }


@pytest.mark.parametrize("name", ["dict", "list", "frozen", "equinox", "bare"])
def test_merge_and_unwrap_give_back_the_structure(name: str) -> None:
    tree = containers()[name]
    wrapped = lora_jax.wrap(tree, lambda path, leaf: leaf.ndim == 2, rank=2)
    for back in (lora_jax.merge(wrapped), lora_jax.unwrap(wrapped)):
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert all(
        a is b
        for a, b in zip(
            jax.tree.leaves(lora_jax.unwrap(wrapped)), jax.tree.leaves(tree), strict=True
        )
    )


def test_merging_plain_params_gives_them_back() -> None:
    for back in (lora_jax.merge(PARAMS), lora_jax.unwrap(PARAMS)):
        assert all(
            a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(PARAMS), strict=True)
        )


def test_wrap_merge_and_unwrap_under_jit() -> None:
    def wrapped(params: Any) -> Any:
        return lora_jax.wrap(params, "dense", rank=2, key=KEY, train="bias")

    eager, compiled = wrapped(PARAMS), jax.jit(wrapped)(PARAMS)
    assert jax.tree.structure(eager) == jax.tree.structure(compiled)
    assert_agree(compiled, eager)
    for fn in (lora_jax.merge, lora_jax.unwrap):
        jax.tree.map(np.testing.assert_array_equal, jax.jit(fn)(compiled), PARAMS)


def test_abstract_params() -> None:
    """The shapes of a wrapped tree are known before any weight is loaded."""
    abstract = jax.eval_shape(lambda: lora_jax.wrap(PARAMS, "dense", rank=2))
    concrete = lora_jax.wrap(PARAMS, "dense", rank=2)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    shapes = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract, concrete)
    assert all(jax.tree.leaves(shapes))


def bf16_error(actual: Any, expected: np.ndarray) -> np.ndarray:
    """Returns the error in units of the last place of bfloat16, whose mantissa has 8 bits."""
    ulp = 2.0 ** (np.floor(np.log2(np.abs(expected))) - 7)
    return np.abs(np.asarray(actual, np.float64) - expected) / ulp


def test_merging_into_bfloat16_rounds_once() -> None:
    params = {"kernel": random(64, 48, dtype=jnp.bfloat16)}
    wrapped = lora_jax.wrap(params, "kernel", rank=4, alpha=2.0, init="gaussian")
    node = wrapped["kernel"]
    B = random(4, 48, seed=1)
    wrapped = {"kernel": lora_jax.LoRAWeight(node.base, node.lora_A, B, node.scale, node.axes)}
    exact = np.asarray(node.base, np.float64) + 0.5 * (
        np.asarray(node.lora_A, np.float64) @ np.asarray(B, np.float64)
    )
    merged = lora_jax.merge(wrapped)["kernel"]
    assert merged.dtype == jnp.bfloat16
    # Half a unit is the rounding of the cast; float32 adds next to nothing.
    assert bf16_error(merged, exact).max() < 0.51
    rounded_twice = node.base + (0.5 * (node.lora_A @ B)).astype(jnp.bfloat16)
    assert bf16_error(rounded_twice, exact).max() > 0.6


def test_the_smaller_side_counts_every_axis_of_it() -> None:
    sizes = {"in": 2 * 3, "out": 5}
    axes = {"kernel": ("in", "in", "out")}
    with pytest.raises(ValueError, match=f"at most {min(sizes.values())}"):
        lora_jax.wrap({"kernel": random(2, 3, 5)}, "kernel", rank=6, axes=axes)
    assert math.prod((2, 3)) == sizes["in"]
