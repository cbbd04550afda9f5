"""How weights and batches are cut over a mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments.common.errors import InputError
from experiments.llm.mesh import Devices, mesh_sizes
from experiments.llm.packing import Batch
from experiments.models.llama import Llama
from tests import tiny_llama


def shapes():
    model = Llama(tiny_llama.config("qwen2", tie_word_embeddings=False))
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


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


def test_rows_are_cut_and_places_are_not():
    batch = Batch(*(np.zeros((3, 8, 16), np.int32),) * 3, *(np.zeros((3, 5), np.float32),) * 4)
    placed = Devices.of({"data": 4, "fsdp": 2}).placed_batch(batch)
    assert placed.tokens.addressable_shards[0].data.shape == (3, 1, 16)
    assert placed.places.addressable_shards[0].data.shape == (3, 5)


def test_one_device_and_meshes_that_do_not_fit():
    one = Devices.of(None)
    assert one.placed_shapes(shapes()) == shapes()
    one.check_rows(3)
    with pytest.raises(InputError, match="data=3 is for 3 devices, and there are 8"):
        Devices.of(mesh_sizes("data=3"))
    with pytest.raises(InputError, match="cut into 8 parts"):
        Devices.of({"data": 4, "fsdp": 2}).check_rows(4)
