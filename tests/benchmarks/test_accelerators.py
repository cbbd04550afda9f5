"""What training steps cost on accelerators that are not there, as their compilers say.

`make test-plan` installs the compilers; without them all of this is skipped.
"""

import jax
import pytest

from benchmarks.machines import devices_of
from benchmarks.models import MLP, TRANSFORMER_BLOCK
from benchmarks.programs import Cost, adapted, by_hand, lora_step
from benchmarks.quantized_programs import (
    DENSE,
    Memory,
    largest_matrix_bytes,
    on_device,
    step_program,
    transformer,
    wrapped_params,
)
from experiments.common.errors import InputError

pytestmark = pytest.mark.usefixtures("optimised", "promoted_ranks", "promotion_of_optax")

SCANNED = transformer(layers=4, embed=512, heads=4, batch=4, tokens=128)
MODELS = {"mlp": MLP, "block": TRANSFORMER_BLOCK, "scanned": SCANNED}


@pytest.fixture
def promotion_of_optax():
    """Lets Adam raise its decay, a float, to the power of its count, an integer."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=["tpu-v5p", "h100"])
def device(request):
    try:
        return devices_of(request.param, 8)[0]
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_the_step_costs_what_one_written_by_hand_does(model, device):
    cost, reference = (
        on_device(lora_step(model, forward(model)), device).lowered().compile()
        for forward in (adapted, by_hand)
    )
    memory, of_reference = Memory.of(cost), Memory.of(reference)
    assert memory.temporary <= 1.05 * of_reference.temporary
    if device.platform == "tpu":
        found, by_hands = Cost.of(cost), Cost.of(reference)
        assert found.flops <= 1.00 * by_hands.flops
        assert found.bytes <= 1.02 * by_hands.bytes


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
