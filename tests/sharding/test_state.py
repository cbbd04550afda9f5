"""Shardings of the state of optimisers: as `init` makes it, cut as what it belongs to."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import sharding
from tests.agreement import assert_identical
from tests.arrays import random

OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "several steps in one": optax.MultiSteps(optax.adam(1e-3), 4),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "muon": optax.contrib.muon(1e-3),
    "lbfgs": optax.lbfgs(),
    "schedule free": optax.contrib.schedule_free_adamw(1e-3),
    "riemannian": optax.chain(lora_jax.updates.riemannian(), optax.adam(1e-3)),
    "lora_plus": optax.chain(optax.adam(1e-3), lora_jax.updates.lora_plus()),
}


@pytest.fixture(params=["automatic", "explicit"])
def placed(request: pytest.FixtureRequest) -> Any:
    """Returns a wrapped tree on a mesh of eight devices, and its shardings."""
    kind = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}[request.param]
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    tree = {"kernel": random(8, 16), "bias": random(16)}
    wrapped = lora_jax.wrap(tree, "kernel", rank=2, dora=True, train="bias")
    shardings = sharding.of(wrapped, mesh, rules={"kernel": P("x", "y"), "bias": P("y")})
    return jax.device_put(wrapped, shardings), shardings


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_cut_as_their_parameters(placed: Any, name: str) -> None:
    wrapped, shardings = placed
    optimizer = lora_jax.optimizer(OPTIMIZERS[name])
    with jax.set_mesh(shardings["bias"].value.mesh):
        expected = optimizer.init(wrapped)
    found = sharding.of_state(optimizer, wrapped)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_identical(jax.jit(optimizer.init, out_shardings=found)(wrapped), expected)
    by_shape = {leaf.shape: own for leaf, own in zip(*map(jax.tree.leaves, placed), strict=True)}
    for leaf, own in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert own.mesh == shardings["bias"].value.mesh
        if leaf.shape in {(8, 2), (2, 16)}:
            assert own.is_equivalent_to(by_shape[leaf.shape], leaf.ndim)


def test_rows_and_columns_are_cut_along_the_axes_that_they_keep(placed: Any) -> None:
    wrapped, _ = placed
    optimizer = lora_jax.optimizer(OPTIMIZERS["adafactor"])
    found = sharding.of_state(optimizer, wrapped)
    shapes = jax.eval_shape(optimizer.init, sharding.abstract(wrapped))
    cuts = {
        (jax.tree_util.keystr(path[-2:]), leaf.shape): tuple(own.spec)
        for (path, leaf), own in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(found), strict=True
        )
    }
    assert cuts["['kernel'].lora_A", (8,)] == ("x",)
    assert cuts["['kernel'].lora_B", (16,)] == ("y",)
    assert cuts["['kernel'].lora_A", (2,)] == cuts["['kernel'].lora_B", (2,)] == (None,)


def test_a_half_and_shapes_alone(placed: Any) -> None:
    adapters = lora_jax.split(placed[0])[0]
    optimizer = optax.adam(1e-3)
    concrete = sharding.of_state(optimizer, adapters)
    abstract = sharding.of_state(optimizer, sharding.abstract(adapters))
    assert concrete == abstract
    with pytest.raises(ValueError, match="The weights in `params` are on no mesh"):
        sharding.of_state(optimizer, jax.device_get(adapters))
    state = jax.jit(optimizer.init, out_shardings=concrete)(adapters)
    held = {leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(state[0].mu)}
    assert held == {(4, 2), (2, 4), (4,)}
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(state))
