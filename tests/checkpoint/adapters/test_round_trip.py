"""`save` and `restore`: what was saved comes back bit for bit."""

import json

import equinox as eqx
import flax.core
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lora_jax
from lora_jax import init as lora_init
from lora_jax.checkpoint import CheckpointError
from lora_jax.checkpoint._adapters import FORMAT_VERSION
from tests.agreement import assert_identical
from tests.arrays import random
from tests.checkpoint.trees import a_dict, no_new_threads
from tests.folders import contents
from tests.trained import as_if_trained


def a_frozen_dict():
    return flax.core.freeze({"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}})


def an_nnx_state():
    return nnx.state(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))


def an_equinox_module():
    return eqx.filter(eqx.nn.MLP(6, 4, 5, depth=1, key=jax.random.key(0)), eqx.is_array)


def a_haiku_dict():
    return {"mlp/~/linear_0": {"w": jnp.ones((6, 4)), "b": jnp.zeros(4)}}


CONTAINERS = {
    "dict": (a_dict, ["kernel", "head/0"]),
    "frozen_dict": (a_frozen_dict, ["kernel"]),
    "nnx_state": (an_nnx_state, ["kernel"]),
    "equinox": (an_equinox_module, ["weight"]),
    "haiku": (a_haiku_dict, ["w"]),
    "array": (lambda: jnp.ones((6, 4)), [".*"]),
}


def test_what_distinguishes_a_variant_is_restored(tmp_path):
    """DoRA's norms and a changed base are found again from the original weights, bit for bit."""
    params = {"stack": random(4, 6, 5), "kernel": jnp.ones((6, 4))}

    def half_taken_out(key, weight2d, rank, scale):
        lora_A = jax.random.normal(key, (weight2d.shape[0], rank))
        lora_B = jax.random.normal(key, (rank, weight2d.shape[1]))
        return weight2d - scale * lora_A @ lora_B, lora_A, lora_init.Frozen(lora_B)

    wrapped = lora_jax.wrap(
        params,
        {"stack": {"layers": (1, 3), "init": half_taken_out}, "kernel": {"rslora": True}},
        rank=2,
        alpha=3,
        dora=True,
        axes={"stack": ("batch", "in", "out")},
    )
    lora_jax.save(tmp_path / "adapters", as_if_trained(wrapped))
    restored = lora_jax.restore(tmp_path / "adapters", params)
    assert_identical(restored, as_if_trained(wrapped))
    assert restored["stack"].frozen == ("lora_B",)


def test_an_adapter_that_grew_is_restored(tmp_path):
    params = {"kernel": random(12, 10)}
    wrapped = lora_jax.arithmetic.resize(lora_jax.wrap(params, "kernel", rank=2, init="pissa"), 4)
    lora_jax.save(tmp_path / "adapters", wrapped)
    assert_identical(lora_jax.restore(tmp_path / "adapters", params), wrapped)


class TestRoundTrip:
    @pytest.mark.parametrize("container", CONTAINERS)
    def test_every_container(self, tmp_path, container):
        make_params, targets = CONTAINERS[container]
        wrapped = as_if_trained(lora_jax.wrap(make_params(), targets, rank=2, alpha=3))
        lora_jax.save(tmp_path / "adapters", wrapped)
        assert_identical(lora_jax.restore(tmp_path / "adapters", make_params()), wrapped)

    @pytest.mark.parametrize("weight_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    @pytest.mark.parametrize("factor_dtype", [jnp.float32, jnp.bfloat16])
    def test_every_dtype(self, tmp_path, weight_dtype, factor_dtype):
        params = a_dict(weight_dtype)
        wrapped = as_if_trained(lora_jax.wrap(params, "kernel", rank=2, dtype=factor_dtype))
        lora_jax.save(tmp_path / "adapters", wrapped)
        assert_identical(lora_jax.restore(tmp_path / "adapters", params), wrapped)

    def test_values_that_are_not_numbers(self, tmp_path, params):
        wrapped = lora_jax.wrap(params, "head/0", rank=1)
        odd = jnp.asarray([[jnp.nan], [jnp.inf], [-jnp.inf], [-0.0], [1e-45]])
        adapters, frozen = lora_jax.split(wrapped)
        adapters = jax.tree.map(lambda x: odd if x.shape == odd.shape else x, adapters)
        wrapped = lora_jax.combine(adapters, frozen)
        lora_jax.save(tmp_path / "adapters", wrapped)
        assert_identical(lora_jax.restore(tmp_path / "adapters", params), wrapped)

    def test_weights_trained_in_full(self, tmp_path, params):
        wrapped = as_if_trained(lora_jax.wrap(params, "kernel", rank=2, train=["bias", "head/0"]))
        lora_jax.save(tmp_path / "adapters", wrapped)
        assert_identical(lora_jax.restore(tmp_path / "adapters", params), wrapped)

    def test_more_axes_and_a_rank_of_its_own(self, tmp_path):
        params = {"experts": jnp.ones((3, 6, 2, 4)), "kernel": jnp.ones((4, 5))}
        axes = {"experts": ("batch", "in", "out", "out")}
        targets = {"experts": {"rank": 3, "alpha": 1}, "kernel": {}}
        wrapped = as_if_trained(lora_jax.wrap(params, targets, rank=2, axes=axes))
        lora_jax.save(tmp_path / "adapters", wrapped)
        assert_identical(lora_jax.restore(tmp_path / "adapters", params), wrapped)

    def test_stacked_adapters(self, tmp_path, params):
        variants = [
            as_if_trained(lora_jax.wrap(params, "kernel", rank=2), seed) for seed in range(3)
        ]
        halves = [lora_jax.split(variant) for variant in variants]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[half[0] for half in halves])
        wrapped = lora_jax.combine(stacked, halves[0][1])
        lora_jax.save(tmp_path / "adapters", wrapped)
        assert_identical(lora_jax.restore(tmp_path / "adapters", params), wrapped)

    def test_sharded_factors(self, tmp_path):
        mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.NamedSharding(mesh, jax.P("model"))
        params = {"kernel": jnp.ones((6, 4))}
        wrapped = as_if_trained(lora_jax.wrap(params, "kernel", rank=2))
        adapters, frozen = lora_jax.split(wrapped)
        sharded = lora_jax.combine(jax.device_put(adapters, sharding), frozen)
        lora_jax.save(tmp_path / "adapters", sharded)
        restored = lora_jax.restore(tmp_path / "adapters", params)
        assert_identical(restored, wrapped)
        assert restored["kernel"].lora_A.devices() == {jax.devices()[0]}

    @pytest.mark.usefixtures("float64")
    def test_float64_asks_for_x64(self, tmp_path):
        params = {"kernel": jnp.ones((6, 4), jnp.float64)}
        wrapped = as_if_trained(lora_jax.wrap(params, "kernel", rank=2))
        lora_jax.save(tmp_path / "adapters", wrapped)
        assert_identical(lora_jax.restore(tmp_path / "adapters", params), wrapped)
        with jax.enable_x64(False), pytest.raises(CheckpointError, match="jax_enable_x64"):
            lora_jax.restore(tmp_path / "adapters", params)

    def test_base_in_another_dtype(self, saved, wrapped):
        restored = lora_jax.restore(saved, a_dict(jnp.bfloat16), check_base=False)
        assert restored["encoder"][0]["kernel"].base.dtype == jnp.bfloat16
        assert_identical(lora_jax.split(restored)[0], lora_jax.split(wrapped)[0])

    def test_base_comes_from_the_params(self, saved, params):
        restored = lora_jax.restore(saved, params)
        assert restored["encoder"][0]["kernel"].base is params["encoder"][0]["kernel"]
        assert restored["head"][0] is params["head"][0]

    def test_relative_path_given_as_text(self, tmp_path, monkeypatch, params, wrapped):
        monkeypatch.chdir(tmp_path)
        lora_jax.save("runs/adapters", wrapped)
        assert_identical(lora_jax.restore("runs/adapters", params), wrapped)

    def test_leaves_no_output_and_no_thread(self, tmp_path, params, wrapped, capfd):
        with no_new_threads():
            lora_jax.save(tmp_path / "adapters", wrapped)
            lora_jax.restore(tmp_path / "adapters", params)
        assert capfd.readouterr() == ("", "")


class TestContents:
    def test_only_adapters(self, tmp_path):
        params = {"kernel": random(1000, 500)}
        lora_jax.save(tmp_path / "adapters", lora_jax.wrap(params, "kernel", rank=1))
        size = sum(len(data) for data in contents(tmp_path).values())
        assert size < params["kernel"].nbytes / 50

    def test_metadata_says_what_was_trained(self, tmp_path, params):
        wrapped = lora_jax.wrap(params, {"encoder/0": {"rank": 3, "alpha": 0.1}}, train="head/0")
        lora_jax.save(tmp_path / "adapters", wrapped)
        text = (tmp_path / "adapters" / "adapters.json").read_text()
        assert text.count("\n") > 10
        metadata = json.loads(text)
        assert metadata["version"] == FORMAT_VERSION
        assert list(metadata["weights"]) == ["encoder/0/kernel", "head/0"]
        kernel, head = metadata["weights"].values()
        assert kernel["kind"] == "LoRAWeight"
        assert (kernel["rank"], kernel["alpha"], kernel["axes"]) == (3, 0.1, ["in", "out"])
        assert (kernel["shape"], kernel["dtype"]) == ([6, 4], "float32")
        assert kernel["arrays"]["lora_A"]["shape"] == [6, 3]
        assert (head["kind"], head["rank"]) == ("FullWeight", None)
        assert head["arrays"]["value"]["dtype"] == "float32"
