"""How weights and batches are cut over a mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments.common.errors import InputError
from experiments.llm import loss as loss_module
from experiments.llm.loss import losses_at_places
from experiments.llm.mesh import Devices, mesh_sizes
from experiments.llm.packing import Batch, Row, batch_of
from experiments.llm.texts import TokenizedExample
from experiments.models.llama import Llama
from experiments.models.shapes import ONE_TOKEN, param_shapes
from tests import tiny_llama


def shapes():
    return param_shapes(Llama(tiny_llama.config("qwen2", tie_word_embeddings=False)), ONE_TOKEN)


def test_weights_are_cut_where_the_mesh_divides_them():
    placed = Devices.of({"fsdp": 2, "tensor": 4}).placed_shapes(shapes())
    layers, spec = placed["layers"], PartitionSpec
    assert placed["embed"]["embedding"].sharding.spec == spec("tensor", "fsdp")
    assert placed["head"]["kernel"].sharding.spec == spec("fsdp", "tensor")
    assert layers["attention"]["query"]["kernel"].sharding.spec == spec(
        None, "fsdp", "tensor", None
    )
    # Two heads of keys on four devices.
    assert layers["attention"]["key"]["kernel"].sharding.spec == spec(None, "fsdp", None, None)
    assert layers["attention"]["out"]["kernel"].sharding.spec == spec(None, "tensor", None, "fsdp")
    assert layers["mlp"]["down"]["kernel"].sharding.spec == spec(None, "tensor", "fsdp")
    assert layers["attention"]["query"]["bias"].sharding.spec == spec(None, None, None)
    assert placed["norm"]["scale"].sharding.spec == spec(None)


def test_rows_are_cut_and_so_are_their_places():
    batch = Batch(*(np.zeros((3, 8, 16), np.int32),) * 3, *(np.zeros((3, 4, 5), np.float32),) * 4)
    devices = Devices.of({"data": 2, "fsdp": 2, "tensor": 2})
    placed = devices.placed_batch(batch)
    assert devices.groups == 4
    assert placed.tokens.addressable_shards[0].data.shape == (3, 2, 16)
    assert placed.places.addressable_shards[0].data.shape == (3, 1, 5)


@pytest.mark.usefixtures("optimised")
def test_a_device_computes_its_own_rows_and_asks_for_no_other(monkeypatch):
    """Hidden states follow the rows and not the weights, nor are logits of others computed."""
    monkeypatch.setattr(loss_module, "CHUNK", 16)
    devices = Devices.of({"fsdp": 8})
    with devices.in_use():
        text = compiled_loss(devices).as_text()
    rows, chunk = 8, loss_module.CHUNK
    assert f"f32[1,{LENGTH},{tiny_llama.HIDDEN}]" in text
    assert f"f32[{rows},{LENGTH},{tiny_llama.HIDDEN}]" not in text
    assert f"f32[1,{chunk},{tiny_llama.VOCABULARY}]" in text
    assert f"f32[{rows},{chunk},{tiny_llama.VOCABULARY}]" not in text


LENGTH = 48


def compiled_loss(devices):
    config = tiny_llama.config("qwen3")
    network = Llama(config, remat=True, cut=devices.hidden_cut)
    whole = TokenizedExample(np.zeros(LENGTH, np.int32), np.arange(LENGTH) > 0)
    batch = batch_of(
        [whole], [Row((0,))] * 8, length=LENGTH, room=LENGTH - 1, groups=devices.groups
    )
    params = devices.placed_shapes(param_shapes(Llama(config), ONE_TOKEN))

    def loss(params, batch):
        return losses_at_places(network.apply, params, batch).sum()

    return jax.jit(jax.grad(loss)).lower(params, devices.placed_batch(batch)).compile()


def test_one_device_and_meshes_that_do_not_fit():
    one = Devices.of(None)
    assert one.placed_shapes(shapes()) == shapes()
    one.check_rows(3)
    with pytest.raises(InputError, match="data=3 is for 3 devices, and there are 8"):
        Devices.of(mesh_sizes("data=3"))
    with pytest.raises(InputError, match="cut into 8 parts"):
        Devices.of({"data": 4, "fsdp": 2}).check_rows(4)
