"""Quantising shapes, under `jit`, and over a mesh; what the programs hold and move."""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax
from lora_jax.quantization import dequantize
from tests.agreement import assert_agree
from tests.arrays import random
from tests.quantization.network import AXES, FORMATS, PARAMS, TARGETS, quantized


def test_shapes_alone() -> None:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    abstract = lora_jax.quantize(shapes, TARGETS, axes=AXES)
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), quantized())
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == expected
    for settings in ({"dora": True}, {"init": "pissa"}, {"init": "loftq"}):
        made = jax.eval_shape(lambda tree, s=settings: untrained(tree, **s), abstract)
        concrete = untrained(quantized(), **settings)
        assert jax.tree.structure(made) == jax.tree.structure(concrete)
        assert lora_jax.count_parameters(made) == lora_jax.count_parameters(concrete)
        assert "nf4" in lora_jax.summary(made)
    jax.eval_shape(lambda: untrained(lora_jax.quantize(PARAMS, TARGETS, axes=AXES)))


def untrained(params: Any, **options: Any) -> Any:
    return lora_jax.wrap(params, TARGETS, axes=AXES, rank=3, **options)


@pytest.mark.parametrize("form", FORMATS)
def test_quantising_under_jit(form: str) -> None:
    compiled = jax.jit(functools.partial(quantized, form))(params=PARAMS)
    eager = quantized(form)
    assert jax.tree.structure(compiled) == jax.tree.structure(eager)
    assert_agree(dequantize(compiled), dequantize(eager), tolerance=2e-3)


MESHES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
CUTS = [("x", None), (None, "x"), ("x", "y"), (None, None)]


OPTIONS: list[dict[str, Any]] = [{"dora": True}, {"init": "pissa"}, {"init": "loftq"}]


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize(
    ("settings", "cuts"),
    [*(({}, cuts) for cuts in CUTS), *((settings, ("x", "y")) for settings in OPTIONS)],
    ids=str,
)
def test_weights_that_are_cut_over_a_mesh(
    settings: dict[str, Any], kind: str, cuts: tuple[Any, ...]
) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), (MESHES[kind],) * 2, devices=jax.devices()[:4])
    axes = {"w": ("batch", "in", "out")}
    leaf = random(4, 256, 16)
    for spec in ((None, *cuts), ("y" if "y" not in cuts else None, *cuts)):
        placed = jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))
        with warnings.catch_warnings(), jax.set_mesh(mesh):
            tree, whole = (
                lora_jax.quantize({"w": each}, "w", axes=axes, format="int8")
                for each in (placed, leaf)
            )
            made = lora_jax.wrap(tree, "w", axes=axes, rank=2, **settings)["w"]
            alone = lora_jax.wrap(whole, "w", axes=axes, rank=2, **settings)["w"]
            sharding = made.base.sharding
            assert sharding.is_equivalent_to(placed.sharding, 3), (sharding, placed.sharding)
            assert_agree(lora_jax.merge(made), lora_jax.merge(alone), tolerance=5e-3)
            if made.magnitude is not None:
                assert_agree(made.squared_norm, alone.squared_norm)
            trained = dataclasses.replace(made, lora_B=made.lora_B + 0.1)
            warnings.simplefilter("ignore", lora_jax.RequantizationWarning)
            merged = lora_jax.merge({"w": trained}, requantize=True)["w"]
            assert merged.sharding.is_equivalent_to(placed.sharding, 3)
            assert_agree(merged.dequantize(), lora_jax.merge({"w": trained})["w"], tolerance=2e-2)
            errors = lora_jax.requantization_errors({"w": trained})["w"]
            assert 0 < errors.error < 2e-2


@pytest.mark.parametrize("cuts", [("x", None, None), ("x", "y", None)], ids=str)
def test_no_device_gathers_a_stack(cuts: tuple[Any, ...]) -> None:
    """Where experts or layers are cut over a mesh, each device quantises its own."""
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), kinds, devices=jax.devices())
    axes = {"w": ("batch", "in", "out")}

    def quantize(leaf: Any) -> Any:
        return lora_jax.quantize({"w": leaf}, "w", axes=axes)

    def wrap(tree: Any) -> Any:
        return lora_jax.wrap(tree, "w", axes=axes, rank=2, dora=True)

    def gathered(function: Callable[[Any], Any], argument: Any) -> list[int]:
        text = jax.jit(function).lower(argument).compile().as_text()
        shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
        return [math.prod(map(int, shape.split(","))) for shape in shapes]

    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(*cuts))
        leaf = jax.device_put(random(8, 256, 64), sharding)
        tree = quantize(leaf)
        wrapped = wrap(tree)
        requantized = functools.partial(lora_jax.merge, requantize=True)
        for function, argument in (
            (quantize, leaf),
            (wrap, tree),
            (requantized, wrapped),
            (lora_jax.requantization_errors, wrapped),
        ):
            # The scales of its matrices, 64 times fewer, are quantised together.
            assert all(size <= leaf.size / 64 for size in gathered(function, argument))


def test_stacks_are_dequantised_matrix_by_matrix(optimised: None) -> None:
    """What is computed from a stack holds a few matrices beside it, and not all of them."""
    del optimised
    layers, size = 12, 256
    params = {"w": jax.ShapeDtypeStruct((layers, size, size), jnp.float32)}
    axes = {"w": ("batch", "in", "out")}
    quantized = lora_jax.quantize(params, "w", axes=axes)
    matrix = 4 * size**2

    def temporary(function: Callable[[Any], Any], argument: Any) -> float:
        memory = jax.jit(function).lower(argument).compile().memory_analysis()
        return memory.temp_size_in_bytes / matrix

    def wrap(params: Any, **options: Any) -> Any:
        return lora_jax.wrap(params, "w", axes=axes, rank=2, **options)

    def scanned(params: Any) -> jax.Array:
        x = jnp.ones((2, size))
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    dora = jax.eval_shape(functools.partial(wrap, dora=True), quantized)
    assert temporary(functools.partial(wrap, dora=True), quantized) < 2
    assert temporary(lora_jax.adapt(scanned), dora) < 2
    assert temporary(functools.partial(wrap, init="pissa"), quantized) < 5
    assert temporary(functools.partial(lora_jax.merge, requantize=True), dora) < 4
    assert temporary(lora_jax.requantization_errors, dora) < 6
    assert temporary(functools.partial(lora_jax.quantize, targets="w", axes=axes), params) < 2
