"""What adapted functions cost once compiled: numbers that repeat exactly, and no timings."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from benchmarks.models import MLP, MODELS, SCANNED_TRANSFORMER
from benchmarks.programs import (
    OPTIMIZER,
    Cost,
    adapted,
    base_forward,
    base_function,
    built,
    by_hand,
    cross_entropy,
    label_shapes,
    lora_step,
    merged_forward,
    program_text,
    wrapped_params,
)

pytestmark = pytest.mark.usefixtures("optimised", "promoted_ranks", "promotion_of_optax")


@pytest.fixture
def promotion_of_optax():
    """Lets Adam raise its decay, a float, to the power of its count, an integer."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def flops(function, *arguments):
    return Cost.of(jax.jit(function).lower(*arguments).compile()).flops


def cost_of_step(model, forward):
    return Cost.of(lora_step(model, forward).lowered().compile())


CASES = {
    **MODELS,
    # As many rows in a batch as the head has columns: no array is the smallest to scale.
    "mlp of rank 4": dataclasses.replace(MLP, rank=4),
    # Factors that are large beside the activations: each copy of a stack of them shows.
    "scanned-transformer of rank 32": dataclasses.replace(SCANNED_TRANSFORMER, rank=32),
}


@pytest.mark.parametrize("model", CASES.values(), ids=list(CASES))
def test_the_step_costs_what_one_written_by_hand_does(model):
    cost, reference = cost_of_step(model, adapted(model)), cost_of_step(model, by_hand(model))
    assert cost.flops <= 1.00 * reference.flops
    assert cost.bytes <= 1.02 * reference.bytes
    assert cost.temporary_bytes <= 1.05 * reference.temporary_bytes


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_merged_inference_is_the_program_of_the_base_model(model):
    base, merged = (
        program_text(make(model).lowered().compile()) for make in (base_forward, merged_forward)
    )
    assert merged == base
    assert "metadata" not in base
    assert re.search(r"^ENTRY .*{$", base, re.MULTILINE)


def test_the_step_of_the_mlp_needs_97_million_operations():
    # 2 · 10 · 2,804,000 forward, the same backward but for the first layer, and the factors.
    cost = cost_of_step(MLP, adapted(MLP))
    assert cost.flops == pytest.approx(97.2e6, rel=0.005)
    assert cost_of_step(MLP, built(MLP)).flops > 1.5 * cost.flops


# --- DoRA --------------------------------------------------------------------------------------


def dora_by_hand(wrapped, x):
    """Returns the MLP's logits with the gain beside each product, and its norm without AB."""

    def layer(params, x):
        node = params["kernel"]
        base, A, B, scale = jax.lax.stop_gradient((node.base, node.lora_A, node.lora_B, node.scale))
        cross = 2 * scale * jnp.sum(B * (A.T @ base), axis=0)
        change = scale**2 * jnp.sum(B * ((A.T @ A) @ B), axis=0)
        rounding = 4 * jnp.finfo(base.dtype).eps * (node.squared_norm + change)
        norm = jnp.sqrt(jnp.maximum(node.squared_norm + cross + change, rounding))
        gain = node.magnitude / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
        product = x @ base + ((x @ node.lora_A) * node.scale) @ node.lora_B
        return product * gain[None] + params["bias"][None]

    for name in ("layer_0", "layer_1"):
        x = jax.nn.relu(layer(wrapped[name], x))
    return layer(wrapped["head"], x)


def test_a_dora_step_costs_what_one_written_by_hand_does():
    cost, reference, dense = (
        Cost.of(lora_step(MLP, forward, dora=True).lowered().compile())
        for forward in (adapted(MLP), dora_by_hand, built(MLP))
    )
    assert cost.flops <= 1.00 * reference.flops
    assert cost.bytes <= 1.02 * reference.bytes
    assert cost.temporary_bytes <= 1.05 * reference.temporary_bytes
    assert dense.flops > 1.5 * cost.flops
    assert dense.temporary_bytes > 10 * cost.temporary_bytes


# --- differentiating the whole tree ------------------------------------------------------------


def whole_tree_step(tx):
    forward = adapted(MLP)

    def step(wrapped, state, inputs, labels):
        def loss(wrapped):
            return cross_entropy(forward(wrapped, inputs), labels)

        value, gradients = jax.value_and_grad(loss)(wrapped)
        updates, state = tx.update(gradients, state, wrapped)
        return optax.apply_updates(wrapped, updates), state, value, optax.tree.norm(gradients)

    return step


def test_clipping_and_logging_the_norm_of_the_whole_gradient_brings_no_frozen_product_back():
    tx = optax.chain(optax.clip_by_global_norm(1.0), lora_jax.optimizer(OPTIMIZER))
    wrapped = wrapped_params(MLP)
    state = jax.eval_shape(tx.init, wrapped)
    arguments = (wrapped, state, MLP.inputs, label_shapes(MLP))
    step = jax.jit(whole_tree_step(tx), donate_argnums=(0, 1))
    cost = Cost.of(step.lower(*arguments).compile())
    assert cost.flops <= 1.01 * cost_of_step(MLP, by_hand(MLP)).flops


def test_the_optimiser_holds_state_for_adapters_only():
    wrapped = wrapped_params(MLP)
    adapters, _ = lora_jax.split(wrapped)
    state = jax.eval_shape(lora_jax.optimizer(OPTIMIZER).init, wrapped)
    count_bytes = 4
    assert bytes_of(state) == bytes_of(jax.eval_shape(OPTIMIZER.init, adapters))
    assert bytes_of(state) == 2 * bytes_of(adapters) + count_bytes


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- many adapters, one base -------------------------------------------------------------------


def test_a_batch_over_stacked_adapters_has_one_base_product():
    users = 4
    adapters, frozen = lora_jax.split(wrapped_params(MLP))
    stacked = jax.tree.map(lambda leaf: stack_of(users, leaf), adapters)
    inputs = stack_of(users, MLP.inputs)
    forward = adapted(MLP)

    def serve(stacked, frozen, inputs):
        def one(adapters, inputs):
            return forward(lora_jax.combine(adapters, frozen), inputs)

        return jax.vmap(one)(stacked, inputs)

    lowered = jax.jit(serve).lower(stacked, frozen, inputs)
    # The weights keep their two axes: no copy of them for each user.
    for shape in ("784x1000", "1000x2000", "2000x10"):
        products = re.findall(rf"dot_general.*tensor<{shape}xf32>\) ->", lowered.as_text())
        assert len(products) == 1
        assert f"tensor<{users}x{shape}xf32>" not in lowered.as_text()

    batch = jax.ShapeDtypeStruct((users * 10, 784), jnp.float32)
    base_flops = flops(base_function(MLP), MLP.params, batch)
    assert Cost.of(lowered.compile()).flops <= 1.01 * base_flops


def stack_of(count, leaf):
    return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype)


# --- the lowered program -----------------------------------------------------------------------


def test_weights_are_arguments_and_not_constants_of_the_program():
    text = lora_step(MLP, adapted(MLP)).lowered().as_text()
    constants = re.findall(
        r"stablehlo\.constant dense<(.{0,20}).*> : tensor<([\dx]*)x?[a-z]+\d+>", text
    )
    # A scalar that fills an array is written once, whatever the array's size.
    assert not [shape for value, shape in constants if value.startswith(('"', "["))]
    parameters = text[text.index("@main(") : text.index("->")]
    assert all(f"tensor<{shape}xf32>" in parameters for shape in ("784x1000", "1000x2000"))


def test_an_inner_function_that_is_called_twice_is_lowered_once():
    @jax.jit
    def inner_layer(weight, x):
        return jnp.tanh(x @ weight)

    def outer(params, x):
        return inner_layer(params["kernel"], inner_layer(params["kernel"], x))

    params = {"kernel": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    wrapped = jax.eval_shape(lambda params: lora_jax.wrap(params, "kernel", rank=2), params)
    text = jax.jit(lora_jax.adapt(outer)).lower(wrapped, x).as_text()
    assert len(re.findall(r"func\.func private @inner_layer", text)) == 1
    assert len(re.findall(r"call @inner_layer", text)) == 2


def test_a_thousand_eager_calls_trace_once():
    traces = []

    def apply(params, x):
        traces.append(x.shape)
        return x @ params["kernel"]

    params = {"kernel": jnp.ones((32, 32))}
    wrapped = lora_jax.wrap(params, "kernel", rank=2)
    fn = lora_jax.adapt(apply)
    for number in range(1000):
        fn(wrapped, np.full((2, 32), number, np.float32))
    assert traces == [(2, 32)]
    fn(wrapped, np.zeros((3, 32), np.float32))
    assert traces == [(2, 32), (3, 32)]
