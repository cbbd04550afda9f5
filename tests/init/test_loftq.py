"""LoftQ: factors that make up for quantisation, against algorithm 1 of the paper in NumPy."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.init import loftq
from tests.agreement import assert_agree
from tests.arrays import random
from tests.dequantized import LEVELS, dequantized

LARGEST = {"int8": 127, "int4": 7, "nf4": 1}
AXES = {
    "matrix": ((70, 40), ("in", "out")),
    "stack": ((3, 40, 20), ("batch", "in", "out")),
    "heads": ((4, 6, 30), ("out", "out", "in")),
    "a stack inside": ((20, 3, 40), ("in", "batch", "out")),
}


def wrapped(leaf: Any, axes: tuple[str, ...], init: Any, **options: Any) -> lora_jax.LoRAWeight:
    tree = lora_jax.wrap({"w": leaf}, "w", axes={"w": axes}, init=init, **{"rank": 4, **options})
    return tree["w"]


def error(node: Any, leaf: Any) -> float:
    return float(np.linalg.norm(np.asarray(lora_jax.merge(node)) - np.asarray(leaf)))


def rounded(matrix: np.ndarray, form: str, block: int) -> tuple[np.ndarray, float]:
    """Returns a matrix (in, out) as it is after quantising it in blocks along its inputs.

    Beside it, how much nearer to a code each weight is than to any other, in units of the scale.
    """
    levels = LEVELS.get(form, np.arange(-LARGEST[form], LARGEST[form] + 1))
    found, margin = np.empty_like(matrix), np.inf
    for start in range(0, len(matrix), block):
        part = matrix[start : start + block]
        scale = np.abs(part).max(axis=0, keepdims=True) / LARGEST[form]
        distances = np.abs((part / scale)[..., None] - levels)
        found[start : start + block] = scale * levels[distances.argmin(-1)]
        nearest = np.sort(distances, axis=-1)
        margin = min(margin, (nearest[..., 1] - nearest[..., 0]).min())
    return found, margin


def algorithm_1(
    matrix: np.ndarray, form: str, block: int, rank: int, steps: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns Q and A·B of Li et al. 2023, algorithm 1, and how clear all its roundings are."""
    product, margin = np.zeros_like(matrix), np.inf
    for _ in range(steps):
        base, of_step = rounded(matrix - product, form, block)
        margin = min(margin, of_step)
        U, S, Vt = np.linalg.svd(matrix - base)
        product = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    return base, product, margin


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("form", LARGEST)
def test_it_is_algorithm_1(form: str, steps: int) -> None:
    for seed in itertools.count():
        # A weight half-way between two codes may go to either: float32 and float64 differ there,
        # and so do the singular vectors of what is left. Take numbers without such a weight.
        leaf = random(40, 24, seed=seed)
        exact = np.asarray(leaf, np.float64)
        base, product, margin = algorithm_1(exact, form, 32, 4, steps)
        if margin > 1e-4:
            break
    init = loftq(format=form, block=32, double_quantize=False, steps=steps)
    # A scale that is not 1: the factors share it out, and their product with it is the paper's.
    node = wrapped(leaf, ("in", "out"), init, alpha=12)
    assert_agree(dequantized(node.base), base, tolerance=1e-6)
    found = float(node.scale) * np.asarray(node.lora_A, np.float64) @ np.asarray(node.lora_B)
    assert_agree(found, product, tolerance=1e-4)
    assert_agree(*(np.linalg.norm(each) for each in (node.lora_A, node.lora_B)))
    # The bases of several steps differ from that of the first by what was moved out of the weight.
    assert (node.initial_A is None) == (steps == 1)
    assert node.encoding == (form, 32, False)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *(("nf4", name) for name in AXES),
        *((form, "matrix") for form in ("int8", "int4", "fp8_e4m3")),
    ],
)
def test_it_makes_up_for_quantisation(form: str, name: str) -> None:
    shape, axes = AXES[name]
    leaf = random(*shape)
    quantized = lora_jax.quantize({"w": leaf}, "w", format=form, axes={"w": axes})["w"]
    without = float(np.linalg.norm(dequantized(quantized) - np.asarray(leaf)))
    for steps in (1, 3):
        init = loftq(format=form, steps=steps)
        errors = [error(wrapped(leaf, axes, init, rank=rank), leaf) for rank in (2, 8, 16)]
        assert without > errors[0] > errors[1] > errors[2]
    # More steps bring the sum nearer to the weight.
    assert error(wrapped(leaf, axes, loftq(format=form, steps=3)), leaf) < error(
        wrapped(leaf, axes, loftq(format=form)), leaf
    )


@pytest.mark.parametrize("name", AXES)
def test_from_quantised_weights_and_the_original(name: str) -> None:
    shape, axes = AXES[name]
    leaf = random(*shape)
    quantized = lora_jax.quantize({"w": leaf}, "w", axes={"w": axes})["w"]
    node = wrapped(quantized, axes, loftq({"w": leaf}))
    assert node.base is quantized
    assert node.encoding is None
    # What wrap quantises itself is the same.
    also = wrapped(leaf, axes, "loftq")
    assert_agree(dequantized(also.base), dequantized(quantized), tolerance=1e-6)
    # A batch axis behind others counts as features, whose scales are quantised together.
    tolerance = 2e-2 if name == "a stack inside" else 1e-5
    assert_agree(lora_jax.merge(also), lora_jax.merge(node), tolerance=tolerance)
    assert lora_jax.unwrap(node) is quantized


@pytest.mark.parametrize("form", [None, "nf4"])
def test_where_nothing_is_lost_it_is_kaiming(form: str | None) -> None:
    levels = LEVELS["nf4"][np.random.default_rng(0).integers(0, 16, (64, 8))]
    levels[0] = 1
    exact = jnp.asarray(levels, jnp.float32)
    if form is None:
        leaf = lora_jax.quantize({"w": exact}, "w")["w"]
        node = wrapped(leaf, ("in", "out"), "loftq")
        assert node.base is leaf
    else:
        init = loftq(format=form, double_quantize=False, steps=3)
        node = wrapped(exact, ("in", "out"), init)
    np.testing.assert_array_equal(node.lora_B, 0)
    bound = float(np.abs(node.lora_A).max())
    assert 0.06 < bound <= 64**-0.5
    gradient = jax.grad(lambda B: jnp.sum(jnp.sin(dense(node, B))))(node.lora_B)
    assert np.linalg.norm(gradient) > 0.1


def dense(node: lora_jax.LoRAWeight, lora_B: jax.Array) -> jax.Array:
    return lora_jax.merge(dataclasses.replace(node, lora_B=lora_B))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_checkpoints_restore_it_exactly(tmp_path: Any, layers: Any, steps: int) -> None:
    params = {"w": random(3, 70, 20)}
    axes = {"w": ("batch", "in", "out")}
    for number, tree in enumerate((params, lora_jax.quantize(params, "w", axes=axes))):
        init = loftq(format="int8", steps=steps)
        made = lora_jax.wrap(tree, "w", axes=axes, rank=3, layers=layers, init=init)
        assert made["w"].base.format == "int8"
        folder = tmp_path / str(number)
        lora_jax.save(folder, made)
        restored = lora_jax.restore(folder, tree)
        assert jax.tree.structure(restored) == jax.tree.structure(made)
        jax.tree.map(np.testing.assert_array_equal, restored, made)
        with pytest.raises(lora_jax.CheckpointError, match="another base"):
            lora_jax.restore(folder, jax.tree.map(twice_as_large, tree))


def twice_as_large(leaf: jax.Array) -> jax.Array:
    return leaf * 2 if leaf.dtype == jnp.float32 else leaf


@pytest.mark.parametrize("steps", [1, 3])
def test_unwrapping_gives_the_weight_to_quantisation(steps: int) -> None:
    leaf = random(70, 40)
    node = wrapped(leaf, ("in", "out"), loftq(steps=steps))
    found = lora_jax.unwrap(node)
    assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
    lost = dequantized(lora_jax.quantize({"w": leaf}, "w")["w"]) - np.asarray(leaf)
    assert np.linalg.norm(found - leaf) <= 1.001 * np.linalg.norm(lost)


def test_the_model_is_kept_on_its_original_base() -> None:
    leaf = random(70, 40)
    for init in (loftq(), loftq(steps=3)):
        node = wrapped(leaf, ("in", "out"), init)
        moved = lora_jax.arithmetic.on_original_base({"w": node})["w"]
        assert_agree(lora_jax.merge(moved), lora_jax.merge(node), tolerance=1e-6)


def test_a_magnitude_is_that_of_the_weight() -> None:
    leaf = random(70, 40)
    node = wrapped(leaf, ("in", "out"), "loftq", dora=True)
    assert_agree(node.magnitude, np.linalg.norm(np.asarray(leaf, np.float64), axis=0))
    assert_agree(node.squared_norm, (dequantized(node.base) ** 2).sum(0))
    plain = error(wrapped(leaf, ("in", "out"), "kaiming"), leaf)
    assert error(node, leaf) < 0.1 * np.linalg.norm(leaf) + plain


def test_names_functions_and_options() -> None:
    leaf = random(70, 40)
    nodes = [wrapped(leaf, ("in", "out"), init) for init in ("loftq", loftq, loftq())]
    for one, other in itertools.pairwise(nodes):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    fast = wrapped(leaf, ("in", "out"), loftq(power_iterations=8))
    assert error(fast, leaf) < 1.01 * error(nodes[0], leaf)
    own = wrapped(leaf, ("in", "out"), loftq(block=16))
    assert (own.base.format, own.base.block) == ("nf4", 16)
    # It is traced like any other initialiser, and on shapes alone.
    abstract = jax.eval_shape(functools.partial(wrapped, axes=("in", "out"), init="loftq"), leaf)
    assert jax.tree.structure(abstract) == jax.tree.structure(nodes[0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"format": "nf5"}, "`loftq` has the format 'nf5'; expected one of 'nf4'"),
        ({"block": 0}, "`loftq` has the block 0; expected at least 1"),
        ({"steps": 0}, "`steps` is 0; expected a whole number of at least 1"),
        ({"original": {"w": np.ones((4, 4))}, "steps": 2}, r"expected loftq\(original\) alone"),
        ({"original": {"w": np.ones((4, 4))}, "format": "int8"}, r"wrap\(original, \.\.\., init="),
    ],
)
def test_bad_settings(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        loftq(**options)


def test_an_original_without_the_weight() -> None:
    leaf = lora_jax.quantize({"w": random(70, 40)}, "w")["w"]
    with pytest.raises(ValueError, match="`init` has no statistics of 'w'"):
        wrapped(leaf, ("in", "out"), loftq({"v": jnp.ones((70, 40))}))
    with pytest.raises(ValueError, match="statistics of shape"):
        wrapped(leaf, ("in", "out"), loftq({"w": jnp.ones((70, 41))}))
