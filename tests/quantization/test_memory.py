"""The memory of compiled training steps on quantised weights: numbers that repeat exactly."""

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from benchmarks.models import MLP, block, block_params, floats
from benchmarks.programs import adapted
from benchmarks.quantized_programs import (
    DENSE,
    Memory,
    counted_bytes,
    in_dtype,
    largest_matrix_bytes,
    step_program,
    transformer,
    wrapped_params,
)

pytestmark = pytest.mark.usefixtures("optimised", "promoted_ranks", "promotion_of_optax")

LAYERS, EMBED = 3, 128
# No activation, nor a stack of them, has as many numbers as a stack of weights.
SCANNED = transformer(layers=LAYERS, embed=EMBED, heads=2, batch=2, tokens=40)
STACKS = {LAYERS * EMBED * EMBED, LAYERS * EMBED * 4 * EMBED}
# The bits of a code; those of the scale of 64 weights: a code, a 256th of a float32, or a float32.
BITS = {"nf4": (4, 8 + 32 / 256), "int8": (8, 32), "int4": (4, 32)}


@pytest.fixture
def promotion_of_optax():
    """Lets Adam raise its decay, a float, to the power of its count, an integer."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def feed_forward(params, x):
    """Returns a residual block of two products."""
    return x + jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def scanned_over(layer):
    """Returns layers in a scan, with a head."""

    def apply(operations, params, x):
        x, _ = jax.lax.scan(lambda x, params: (layer(params, x), None), x, params["blocks"])
        return operations.project(x, params["head"]["kernel"])

    return apply


def in_a_branch(layer):
    def branched(params, x):
        return jax.lax.cond(jnp.sum(x) > 0, layer, lambda params, x: x, params, x)

    return branched


AROUND = {
    "nothing": lambda layer: layer,
    "checkpoint": functools.partial(jax.checkpoint, prevent_cse=False),
    "checkpoint of products": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable
    ),
    "cond": in_a_branch,
    "jit": jax.jit,
}


def unscanned(operations, params, x):
    for layer in range(LAYERS):
        x = block(operations, params[f"block_{layer}"], x)
    return operations.project(x, params["head"]["kernel"])


# The same stacks, as the two products of a block alone.
FEED_FORWARD = dataclasses.replace(
    SCANNED,
    params={
        "blocks": {
            "up": {"kernel": floats(LAYERS, EMBED, 4 * EMBED)},
            "down": {"kernel": floats(LAYERS, 4 * EMBED, EMBED)},
        },
        "head": {"kernel": floats(EMBED, 10)},
    },
)
UNSCANNED = dataclasses.replace(
    SCANNED,
    name="unscanned-transformer",
    apply=unscanned,
    params={
        **{f"block_{layer}": block_params(EMBED, 2) for layer in range(LAYERS)},
        "head": {"kernel": floats(EMBED, 10)},
    },
    targets="block_.*",
)
# Twelve examples: ten are as many as the head has columns.
MODELS = {
    "mlp": dataclasses.replace(MLP, inputs=floats(12, 784)),
    "scanned": SCANNED,
    "unscanned": UNSCANNED,
}


def compiled_step(model, name):
    return step_program(model, wrapped_params(model, name)).lowered().compile()


def float_sizes(compiled):
    """Returns how many numbers each floating-point array of a compiled program has."""
    shapes = re.findall(r"\b(?:f16|bf16|f32|f64)\[([\d,]+)\]", compiled.as_text())
    return {math.prod(map(int, shape.split(","))) for shape in shapes}


@pytest.mark.parametrize(
    ("model", "name"),
    [*(("mlp", name) for name in BITS), ("scanned", "nf4"), ("unscanned", "nf4")],
)
def test_arguments_take_the_counted_bits(model, name):
    model = MODELS[model]
    code, scale = BITS[name]
    kernels = adapted_kernels(model)
    quantised = sum(
        code * size + scale * -(-inputs // 64) * (size // inputs) for size, inputs in kernels
    )
    rest = counted_bytes(wrapped_params(model, DENSE)) - 4 * sum(size for size, _ in kernels)
    arguments = Memory.of(
        jax.jit(adapted(model)).lower(wrapped_params(model, name), model.inputs).compile()
    ).arguments
    inputs = counted_bytes(model.inputs)
    assert arguments - inputs == pytest.approx(rest + quantised / 8, rel=0.02)


def adapted_kernels(model):
    """Returns the number of weights and of inputs of each adapted matrix; a stack has several."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        first, *_, last = names = [key.key for key in path]
        if last != "kernel" or (first == "head" and model.name != MLP.name):
            continue
        shape = leaf.shape[1:] if first == "blocks" else leaf.shape
        inputs = math.prod(shape[:2]) if names[-2] == "out" else shape[0]
        found += [(math.prod(shape), inputs)] * (LAYERS if first == "blocks" else 1)
    return found


@pytest.mark.parametrize(
    ("around", "name", "dtype"),
    [
        *((around, "nf4", jnp.float32) for around in AROUND),
        ("checkpoint", "int8", jnp.float32),
        ("checkpoint", "nf4", jnp.bfloat16),
        ("checkpoint", "fp8_e4m3", jnp.bfloat16),
    ],
    ids=str,
)
def test_a_step_over_scanned_layers_needs_one_dequantised_layer_more(around, name, dtype):
    model = in_dtype(FEED_FORWARD, dtype)
    model = dataclasses.replace(model, apply=scanned_over(AROUND[around](feed_forward)))
    assert_one_layer_more(model, name, Memory.of(compiled_step(model, DENSE)).temporary)


def test_a_step_of_the_scanned_transformer_needs_one_dequantised_layer_more():
    dense = compiled_step(SCANNED, DENSE)
    assert float_sizes(dense) >= STACKS
    assert_one_layer_more(SCANNED, "nf4", Memory.of(dense).temporary)


def assert_one_layer_more(model, name, dense):
    compiled = compiled_step(model, name)
    assert not float_sizes(compiled) & STACKS
    layer = largest_matrix_bytes(wrapped_params(model, name))
    # What is made again beside the layer, such as x · lora_A, is small.
    assert Memory.of(compiled).temporary <= dense + 1.05 * layer


TEMPORARY_BYTES = """
from benchmarks.models import MLP
from benchmarks.quantized_programs import Memory, step_program, wrapped_params

print(Memory.of(step_program(MLP, wrapped_params(MLP, "nf4")).lowered().compile()).temporary)
"""


def test_scheduled_for_memory_layers_that_are_not_scanned_need_one_too():
    found = {}
    for concurrent in ("false", "true"):
        flag = f"--xla_cpu_enable_concurrency_optimized_scheduler={concurrent}"
        found[concurrent] = int(
            subprocess.run(
                [sys.executable, "-c", TEMPORARY_BYTES],
                env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag},
                capture_output=True,
                check=True,
            ).stdout
        )
    dense = Memory.of(compiled_step(MLP, DENSE)).temporary
    layer = largest_matrix_bytes(wrapped_params(MLP, "nf4"))
    # Its numbers, its codes in bytes of their own, and its scales.
    assert found["false"] - dense < 1.3 * layer < found["true"] - dense


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_the_passes_share_codes_and_no_dequantised_weight(model, name):
    quantised, dense = (kept_between_passes(model, each) for each in (name, DENSE))
    sizes = {size for size, _ in adapted_kernels(model)} | STACKS
    assert not [leaf.shape for leaf in quantised if leaf.size in sizes and is_float(leaf)]
    assert [leaf for leaf in dense if leaf.size in sizes and is_float(leaf)]


def kept_between_passes(model, name):
    """Returns what the backward pass takes from the forward pass, as shapes."""
    adapters, frozen = lora_jax.split(wrapped_params(model, name))
    forward = adapted(model)

    def forward_pass(adapters, frozen, inputs):
        logits, backward = jax.vjp(
            lambda adapters: forward(lora_jax.combine(adapters, frozen), inputs), adapters
        )
        return logits, jax.tree.leaves(backward)

    _, kept = jax.eval_shape(forward_pass, adapters, frozen, model.inputs)
    return kept


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)
