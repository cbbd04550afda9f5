"""`TrainingCheckpoints`: what was saved comes back bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax.checkpoint import CheckpointError, TrainingCheckpoints
from tests.agreement import assert_identical
from tests.arrays import random
from tests.checkpoint.training.running import round_trip
from tests.checkpoint.trees import no_new_threads
from tests.folders import contents
from tests.trained import as_if_trained


class TestRoundTrip:
    def test_what_trains_comes_back_into_a_fresh_tree(self, folder, fresh, wrapped, tx, state):
        restored = round_trip(folder, wrapped, state, fresh, tx.init(fresh))
        assert_identical(restored.wrapped, wrapped)
        assert_identical(restored.optimizer_state, state)
        assert (restored.step, restored.data_position, restored.metrics) == (1, None, {})
        first = restored.wrapped["encoder"][0]
        assert first["kernel"].base is fresh["encoder"][0]["kernel"].base

    def test_into_an_abstract_optimiser_state(self, folder, fresh, wrapped, tx, state):
        abstract = jax.eval_shape(tx.init, fresh)
        assert_identical(round_trip(folder, wrapped, state, fresh, abstract).optimizer_state, state)

    @pytest.mark.parametrize(
        "options",
        [
            {"dora": True},
            {"init": "pissa"},
            {"init": "pissa", "dora": True},
            {"freeze": "lora_A"},
            {"dtype": jnp.bfloat16, "rslora": True},
        ],
        ids=str,
    )
    def test_variants(self, folder, params, options):
        params = jax.tree.map(
            lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), params
        )
        wrapped = as_if_trained(lora_jax.wrap(params, "kernel", rank=2, **options))
        again = lora_jax.wrap(params, "kernel", rank=2, **options)
        assert_identical(round_trip(folder, wrapped, (), again, ()).wrapped, wrapped)

    def test_a_changed_base_is_found_again_by_the_adapters_of_the_start(self, folder, params):
        """Where wrapping again would give other bits, `save` and `restore` give the same."""
        params["encoder"][0]["kernel"] = random(6, 4)
        begun = lora_jax.wrap(params, "encoder/0", rank=2, init="pissa", dora=True)
        lora_jax.save(folder / "begun", begun)
        again = lora_jax.restore(folder / "begun", params)
        wrapped = as_if_trained(begun)
        assert_identical(round_trip(folder, wrapped, (), again, ()).wrapped, wrapped)

    def test_a_frozen_factor_drawn_from_another_key(self, folder, params):
        wrapped, other = (
            lora_jax.wrap(params, "kernel", rank=2, freeze="lora_A", key=jax.random.key(seed))
            for seed in (1, 2)
        )
        assert_identical(round_trip(folder, wrapped, (), other, ()).wrapped, wrapped)

    def test_numbers_that_are_not_finite(self, folder, fresh, wrapped, state):
        diverged = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), wrapped)
        diverged = lora_jax.combine(lora_jax.split(diverged)[0], lora_jax.split(wrapped)[1])
        restored = round_trip(
            folder, diverged, state, fresh, state, metrics={"loss": np.inf, "other": -np.inf}
        )
        assert_identical(restored.wrapped, diverged)
        assert restored.metrics == {"loss": np.inf, "other": -np.inf}

    def test_every_kind_of_leaf(self, folder, wrapped):
        state = {
            "key": jax.random.key(3),
            "keys": jax.random.split(jax.random.key(4, impl="rbg"), (2, 2)),
            "weak": jnp.asarray(0.1),
            "weak vector": jnp.asarray(0.1) * jnp.broadcast_to(jnp.asarray(2.0), 3),
            "numpy": np.arange(3.0),
            "scalar": np.float32(0.1),
            "bool": True,
            "int": 2**100,
            "float": 0.1,
            "empty": jnp.zeros((0, 3)),
            "small": jnp.ones(3, jnp.bfloat16),
            "mask": jnp.asarray([True, False]),
            "nothing": None,
        }
        assert state["weak vector"].weak_type
        restored = round_trip(folder, wrapped, state).optimizer_state
        for name, leaf in state.items():
            assert type(restored[name]) is type(leaf), name
            if name in ("key", "keys"):
                assert restored[name].dtype == leaf.dtype
                assert (jax.random.key_data(restored[name]) == jax.random.key_data(leaf)).all()
                continue
            if isinstance(leaf, jax.Array):
                assert restored[name].weak_type == leaf.weak_type, name
            np.testing.assert_array_equal(restored[name], leaf, strict=hasattr(leaf, "dtype"))

    def test_a_number_that_training_made_an_array(self, folder, wrapped):
        restored = round_trip(folder, wrapped, {"count": jnp.asarray(3)}, wrapped, {"count": 0})
        assert isinstance(restored.optimizer_state["count"], jax.Array)

    def test_data_position(self, folder, wrapped):
        generator = np.random.default_rng(5)
        generator.random(3)
        position = {
            "random": generator.bit_generator.state,
            "legacy": np.random.MT19937(3).state,
            "order": np.arange(5)[::-1],
            "half": np.asarray(jnp.ones(2, jnp.bfloat16)),
            "index": np.int64(3),
            "key": jax.random.key(5),
            "list": [1, 0.1, "text", None, True, (2, float("inf"))],
        }
        restored = round_trip(folder, wrapped, (), data_position=position).data_position
        expected = generator.random(4)
        generator.bit_generator.state = restored["random"]
        assert (generator.random(4) == expected).all()
        assert (
            restored["legacy"]["state"]["key"] == np.random.MT19937(3).state["state"]["key"]
        ).all()
        np.testing.assert_array_equal(restored["order"], position["order"], strict=True)
        np.testing.assert_array_equal(restored["half"], position["half"], strict=True)
        assert restored["order"].flags.writeable
        assert type(restored["index"]) is np.int64
        assert jax.random.key_data(restored["key"]).tolist() == [0, 5]
        assert restored["list"] == position["list"]

    @pytest.mark.parametrize(
        ("position", "message"),
        [
            ({"a": [1, {2}]}, "a set at 'a/1'"),
            ({"a": {1: 2}}, r"a dict with the keys \[1\] at 'a'"),
            ({"$type": "tuple"}, "a dict with the keys"),
            (
                {"generator": np.random.default_rng(0)},
                "a Generator at 'generator'.*bit_generator.state",
            ),
            (np.array([object()]), "an array of object"),
        ],
    )
    def test_a_data_position_that_cannot_be_stored(self, folder, wrapped, position, message):
        with (
            TrainingCheckpoints(folder) as checkpoints,
            pytest.raises(CheckpointError, match=f"`data_position` has {message}"),
        ):
            checkpoints.save(1, wrapped, (), data_position=position)
        assert not folder.exists()

    def test_a_state_that_cannot_be_stored(self, folder, wrapped):
        with (
            TrainingCheckpoints(folder) as checkpoints,
            pytest.raises(
                CheckpointError, match="'optimizer_state/name' is a str; expected arrays"
            ),
        ):
            checkpoints.save(1, wrapped, {"name": "text"})

    def test_only_what_trains_is_stored(self, folder):
        params = {"kernel": random(1000, 500)}
        wrapped = lora_jax.wrap(params, "kernel", rank=1)
        round_trip(folder, wrapped, optax.adam(1.0).init(lora_jax.split(wrapped)[0]))
        assert sum(map(len, contents(folder).values())) < params["kernel"].nbytes / 30

    def test_leaves_no_output_and_no_thread(self, folder, wrapped, state, capfd):
        with no_new_threads():
            round_trip(folder, wrapped, state)
        assert capfd.readouterr() == ("", "")
