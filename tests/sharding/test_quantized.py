"""Quantised weights on a mesh: what is moved is what a dense base moves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from benchmarks.scale.collectives import collectives

LAYERS, EMBED, HIDDEN, LENGTH = 3, 256, 512, 64
AXES = dict.fromkeys(("up", "down"), ("batch", "in", "out"))
# Packed or not, with a codebook or not, whole numbers or float8.
FORMATS = ("nf4", "int4", "int8", "fp8_e4m3")
# Rows over the first axis, tokens and weights over the second.
SHAPES = {"tensor": (1, 4), "fsdp and tensor": (2, 2)}


def mesh_of(shape: tuple[int, int]) -> Mesh:
    return jax.make_mesh(
        shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )


def params(mesh: Mesh) -> Any:
    def weight(shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    return {
        "up": weight((LAYERS, EMBED, HIDDEN), P(None, "fsdp", "tensor")),
        "down": weight((LAYERS, HIDDEN, EMBED), P(None, "tensor", "fsdp")),
    }


def moved_bytes(mesh: Mesh, tree: Any) -> int:
    """Returns what a device gets in a step of layers whose activations are cut as well."""
    tokens = NamedSharding(mesh, P("fsdp", "tensor", None))

    @jax.checkpoint
    def layer(x: Any, own: Any) -> Any:
        hidden = jnp.tanh(x @ own["up"]) @ own["down"]
        return jax.lax.with_sharding_constraint(x + hidden, tokens)

    @lora_jax.adapt
    def apply(tree: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, own: (layer(x, own), None), x, tree)[0]

    def gradient(tree: Any, x: Any) -> Any:
        return jax.grad(lambda x: jnp.sum(jnp.square(apply(tree, x))))(x)

    shape = (mesh.shape["fsdp"], LENGTH, EMBED)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=tokens)
    text = jax.jit(gradient).lower(tree, x).compile().as_text()
    return sum(traffic.bytes for traffic in collectives(text).values())


@functools.cache
def moved_with_dense_weights(shape: tuple[int, int]) -> int:
    mesh = mesh_of(shape)
    return moved_bytes(mesh, params(mesh))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_quantised_weight_moves_no_more_than_a_dense_one(format_name, shape):
    mesh = mesh_of(shape)
    quantized = lora_jax.quantize(
        params(mesh), "up|down", format=format_name, axes=AXES, double_quantize=False
    )
    moved = moved_bytes(mesh, quantized)
    assert 0 < moved <= moved_with_dense_weights(shape)


def test_scales_that_are_quantised_themselves_are_all_that_is_gathered():
    mesh = mesh_of(SHAPES["tensor"])
    quantized = lora_jax.quantize(params(mesh), "up|down", axes=AXES)
    # In float32, for each of the three times that a layer is computed.
    scales = sum(3 * 4 * weight.scales.size for weight in quantized.values())
    assert moved_bytes(mesh, quantized) <= moved_with_dense_weights(SHAPES["tensor"]) + scales
