"""What training steps cost on accelerators that are not there, as their compilers say.

`make test-plan` installs the compilers; without them all of this is skipped.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lora_jax
from benchmarks.machines import devices_of
from benchmarks.models import MLP, TRANSFORMER_BLOCK
from benchmarks.programs import (
    OPTIMIZER,
    Cost,
    Program,
    adapted,
    by_hand,
    lora_step,
    training_step,
)
from benchmarks.quantized_programs import (
    DENSE,
    Memory,
    largest_matrix_bytes,
    on_device,
    step_program,
    transformer,
    wrapped_params,
)
from benchmarks.scale import models, plans
from experiments.common.errors import InputError
from experiments.models.bert import BertClassifier, BertConfig
from tests import tiny_llama

pytestmark = pytest.mark.usefixtures("optimised", "promoted_ranks", "promotion_of_optax")

SCANNED = transformer(layers=4, embed=512, heads=4, batch=4, tokens=128)
MODELS = {"mlp": MLP, "block": TRANSFORMER_BLOCK, "scanned": SCANNED}
# The encoder of the study on text, and one of its batches.
ENCODER = BertConfig(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=512,
)
SENTENCES = (32, 32)


@pytest.fixture
def promotion_of_optax():
    """Lets Adam raise its decay, a float, to the power of its count, an integer."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=["tpu-v5p", "h100"])
def machine(request):
    try:
        devices_of(request.param, 8)
    except InputError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def device(machine):
    return devices_of(machine, 8)[0]


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_the_step_costs_what_one_written_by_hand_does(model, device):
    cost, reference = (
        on_device(lora_step(model, forward(model)), device).lowered().compile()
        for forward in (adapted, by_hand)
    )
    assert_no_work_is_wasted(cost, reference, device)


def test_so_does_that_of_the_study_on_text(device):
    cost, reference = (
        on_device(text_step(forward), device).lowered().compile()
        for forward in (lora_jax.adapt(encoded), encoded_with_factors)
    )
    assert_no_work_is_wasted(cost, reference, device)


def assert_no_work_is_wasted(compiled, reference, device):
    memory, of_reference = Memory.of(compiled), Memory.of(reference)
    assert memory.temporary <= 1.05 * of_reference.temporary
    if device.platform == "tpu":
        cost, of_reference = Cost.of(compiled), Cost.of(reference)
        assert cost.flops <= 1.00 * of_reference.flops
        assert cost.bytes <= 1.02 * of_reference.bytes


def encoded(params, token_ids):
    mask = jnp.ones(SENTENCES, bool)
    return BertClassifier(ENCODER, classes=2).apply({"params": params}, token_ids, mask)


def encoded_with_factors(wrapped, token_ids):
    """Returns the same with the factors written into each dense layer."""

    def dense(call, arguments, options, context):
        if not isinstance(context.module, nn.Dense) or context.module.name == "classifier":
            return call(*arguments, **options)
        (x,) = arguments
        layer = wrapped
        for name in context.module.path:
            layer = layer[name]
        node = layer["kernel"]
        base, scale = jax.lax.stop_gradient((node.base, node.scale))
        return x @ base + scale * ((x @ node.lora_A) @ node.lora_B) + layer["bias"]

    with nn.intercept_methods(dense):
        return encoded(lora_jax.unwrap(wrapped), token_ids)


def text_step(forward):
    token_ids = jax.ShapeDtypeStruct(SENTENCES, jnp.int32)
    params = jax.eval_shape(
        lambda: BertClassifier(ENCODER, classes=2).init(
            jax.random.key(0), jnp.zeros(SENTENCES, jnp.int32), jnp.ones(SENTENCES, bool)
        )
    )["params"]
    wrapped = lora_jax.wrap(params, "layer_.*/kernel", rank=8)
    adapters, frozen = lora_jax.split(wrapped)

    def apply(adapters, frozen, token_ids):
        return forward(lora_jax.combine(adapters, frozen), token_ids)

    labels = jax.ShapeDtypeStruct(SENTENCES[:1], jnp.int32)
    arguments = (adapters, jax.eval_shape(OPTIMIZER.init, adapters), frozen, token_ids, labels)
    return Program(training_step(apply), arguments, donated=(0, 1))


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_quantised_layers_need_a_few_dequantised_layers_more(name, device):
    """A TPU unpacks codes into layouts of its own, for which it keeps two more."""
    dense, quantised = (
        Memory.of(
            on_device(step_program(SCANNED, wrapped_params(SCANNED, each)), device)
            .lowered()
            .compile()
        )
        for each in (DENSE, name)
    )
    layer = largest_matrix_bytes(wrapped_params(SCANNED, name))
    assert quantised.arguments < 0.5 * dense.arguments
    assert quantised.temporary <= dense.temporary + 3 * layer


def test_a_device_works_on_its_own_examples_alone(machine, monkeypatch):
    """With twice the examples on twice the devices, the study's step on language needs no more."""
    monkeypatch.setitem(models.MODELS, "small", tiny_llama.config("qwen3"))
    half, whole = (
        plans.plan_of(plans.Task("small", plans.LORA, machine, devices, tensor=1, length=256))
        for devices in (8, 16)
    )
    assert whole.temporaries <= 1.1 * half.temporaries


def test_a_quantised_base_is_gathered_no_more_than_a_dense_one(machine, monkeypatch):
    """Devices that share an example cut its activations over the axis that weights are cut over."""
    sizes = {"hidden_size": 512, "intermediate_size": 1_024, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    monkeypatch.setitem(models.MODELS, "small", tiny_llama.config("llama", **sizes, **heads))
    moved = {}
    for kind in (plans.LORA, plans.NF4):
        plan = plans.plan_of(plans.Task("small", kind, machine, 4, tensor=4, length=256))
        moved[kind] = sum(traffic.bytes for traffic in plan.traffic.values())
    assert 0 < moved[plans.NF4] <= 1.2 * moved[plans.LORA]
