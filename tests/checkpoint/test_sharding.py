"""Trees that are sharded: what was saved from one mesh comes back on another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.checkpoint import CheckpointError, TrainingCheckpoints
from lora_jax.checkpoint._fingerprints import frozen_fingerprints
from tests.agreement import assert_identical
from tests.arrays import random
from tests.trained import as_if_trained

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


def mesh(shape, axis_type=AUTO):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(axis_type,) * 2)


def params():
    return {"kernel": random(16, 8), "bias": jnp.arange(8.0)}


def sharded_wrap(on, kernel, lora_A, lora_B):
    """Returns a wrapped tree whose weights have these specs on a mesh, and fresh factors."""
    weights = params()
    if on is not None:
        weights["kernel"] = jax.device_put(weights["kernel"], jax.NamedSharding(on, kernel))
        weights["bias"] = jax.device_put(weights["bias"], jax.NamedSharding(on, jax.P()))
    wrapped = lora_jax.wrap(weights, "kernel", rank=4, train="bias")
    if on is None:
        return wrapped
    specs = {"lora_A": lora_A, "lora_B": lora_B, "scale": jax.P()}
    node = wrapped["kernel"]
    moved = {
        name: jax.device_put(getattr(node, name), jax.NamedSharding(on, spec))
        for name, spec in specs.items()
    }
    return {**wrapped, "kernel": lora_jax.LoRAWeight(**{**vars(node), **moved})}


PLACES = {
    "one device": lambda: sharded_wrap(None, None, None, None),
    "eight by model": lambda: sharded_wrap(
        mesh((1, 8)), jax.P(None, "model"), jax.P("model"), jax.P(None, "model")
    ),
    "two by four": lambda: sharded_wrap(
        mesh((2, 4)), jax.P("data", "model"), jax.P("data", "model"), jax.P("model", "data")
    ),
    "replicated": lambda: sharded_wrap(mesh((4, 2)), jax.P(), jax.P(), jax.P()),
    "explicit": lambda: sharded_wrap(
        mesh((2, 4), EXPLICIT), jax.P("data", "model"), jax.P("data"), jax.P(None, "model")
    ),
}


def assert_placed_like(actual, expected):
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.sharding == wanted.sharding
        assert got.committed == wanted.committed


@pytest.mark.parametrize("into", PLACES)
@pytest.mark.parametrize("saved_from", PLACES)
def test_training_state_on_another_mesh(tmp_path, saved_from, into):
    wrapped = as_if_trained(PLACES[saved_from]())
    state = as_if_trained(wrapped, seed=5)
    target = PLACES[into]()
    with TrainingCheckpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, wrapped, lora_jax.split(state)[0])
        restored = checkpoints.restore(target, lora_jax.split(target)[0])
    assert_identical(restored.wrapped, wrapped)
    assert_identical(restored.optimizer_state, lora_jax.split(state)[0])
    assert_placed_like(restored.wrapped, target)
    assert_placed_like(restored.optimizer_state, lora_jax.split(target)[0])


@pytest.mark.parametrize("into", PLACES)
@pytest.mark.parametrize("saved_from", ["one device", "two by four"])
def test_adapters_like_a_tree_on_another_mesh(tmp_path, saved_from, into):
    wrapped = as_if_trained(PLACES[saved_from]())
    lora_jax.save(tmp_path / "adapters", wrapped)
    target = PLACES[into]()
    weights = lora_jax.unwrap(target)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding if x.committed else None
        ),
        target,
    )
    for like in (target, abstract):
        restored = lora_jax.restore(tmp_path / "adapters", weights, like=like)
        assert_identical(restored, wrapped)
        assert_placed_like(restored, target)


def test_adapters_are_free_to_move_to_the_mesh_of_the_weights(tmp_path):
    """Without `like=` the factors are on one device, and a compiled function takes them along."""
    lora_jax.save(tmp_path / "adapters", as_if_trained(PLACES["one device"]()))
    weights = lora_jax.unwrap(PLACES["two by four"]())
    restored = lora_jax.restore(tmp_path / "adapters", weights)
    assert not restored["kernel"].lora_A.committed
    model = jax.jit(lora_jax.adapt(lambda params, x: x @ params["kernel"] + params["bias"][None]))
    outputs = model(restored, jnp.ones((2, 16)))
    assert outputs.sharding.device_set == weights["kernel"].sharding.device_set


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (params, "`like` has no adapters"),
        (lambda: lora_jax.wrap(params(), "kernel", rank=4), "`like` at 'bias': .* no adapter"),
        (
            lambda: lora_jax.wrap(params(), "kernel", rank=2, train="bias"),
            r"`like` at 'kernel': .*\(16, 4\).*\(16, 2\)",
        ),
    ],
)
def test_a_tree_that_is_not_like_the_saved_one(tmp_path, like, message):
    lora_jax.save(tmp_path / "adapters", PLACES["one device"]())
    with pytest.raises(CheckpointError, match=message):
        lora_jax.restore(tmp_path / "adapters", params(), like=like())


class TestFingerprint:
    def test_is_the_same_on_every_mesh(self):
        prints = {name: frozen_fingerprints(place()) for name, place in PLACES.items()}
        assert len({tuple(each.items()) for each in prints.values()}) == 1

    @pytest.mark.parametrize(
        "dtype",
        [
            "bool",
            "int4",
            "uint8",
            "int32",
            "float8_e4m3fn",
            "float4_e2m1fn",
            "bfloat16",
            "complex64",
        ],
    )
    def test_every_element_counts(self, dtype):
        zeros = jnp.zeros((3, 5), dtype)
        arrays = [zeros] + [
            zeros.at[row, column].set(jnp.ones((), dtype))
            for row in range(3)
            for column in range(5)
        ]
        prints = [frozen_fingerprints({"x": array})["x"] for array in arrays]
        assert len(set(prints)) == len(arrays)

    @pytest.mark.usefixtures("float64")
    def test_both_halves_of_64_bits_count(self):
        numbers = jnp.asarray([1.0, 2.0**-52, 2.0], jnp.float64)
        arrays = [numbers, numbers.at[0].add(2.0**-52), numbers.at[2].set(4)]
        assert len({frozen_fingerprints([array])["0"] for array in arrays}) == 3

    def test_is_its_definition(self):
        """Checkpoints hold it, so that it must not change."""
        array = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
        mixed = array.view(np.uint32).ravel() + np.arange(24, dtype=np.uint32) * np.uint32(
            0x9E3779B1
        )
        mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
        mixed ^= mixed >> 16
        assert frozen_fingerprints([array]) == {"0": int(mixed.sum(dtype=np.uint32))}

    def test_numpy_keys_and_what_is_no_array(self):
        tree = {"a": [1.0, "text", None, jnp.tanh], "b": jax.random.key(1)}
        keys = frozen_fingerprints(tree)
        assert list(keys) == ["b"]
        assert keys["b"] == frozen_fingerprints({"b": jax.random.key_data(tree["b"])})["b"]
        array = random(4, 3)
        assert frozen_fingerprints([array]) == frozen_fingerprints([jax.device_get(array)])
