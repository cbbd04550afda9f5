"""`TrainingCheckpoints`: clear about what does not fit."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax
from lora_jax._paths import map_with_paths
from lora_jax.checkpoint import CheckpointError, TrainingCheckpoints
from tests.agreement import assert_identical
from tests.checkpoint.training.running import names, round_trip


class TestRefused:
    @pytest.mark.wrong_types
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"keep": 0}, "`keep` is 0"),
            ({"every": 0}, "`every` is 0"),
            ({"mode": "least"}, "`mode` is 'least'"),
        ],
    )
    def test_arguments(self, folder, options, message):
        with pytest.raises(CheckpointError, match=message):
            TrainingCheckpoints(folder, **options)

    def test_a_best_step_without_a_metric(self, saved):
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(CheckpointError, match="best="),
        ):
            _ = checkpoints.best_step

    def test_metrics_without_the_best(self, folder, wrapped):
        with (
            TrainingCheckpoints(folder, best="loss") as checkpoints,
            pytest.raises(CheckpointError, match=r"`metrics` has \['accuracy'\]; expected 'loss'"),
        ):
            checkpoints.save(1, wrapped, (), metrics={"accuracy": 1})

    @pytest.mark.parametrize("step", [-1, 3])
    def test_a_step_that_is_not_there(self, saved, wrapped, state, step):
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(CheckpointError, match=rf"`step` is {step}.*\[2, 4\]"),
        ):
            checkpoints.restore(wrapped, state, step=step)

    def test_a_negative_step(self, folder, wrapped):
        with (
            TrainingCheckpoints(folder) as checkpoints,
            pytest.raises(CheckpointError, match="is -1"),
        ):
            checkpoints.save(-1, wrapped, ())

    def test_a_file_for_a_folder(self, tmp_path):
        (tmp_path / "notes").write_text("text")
        with pytest.raises(CheckpointError, match="notes is a file"):
            TrainingCheckpoints(tmp_path / "notes")

    def test_a_folder_with_steps_of_another_program(self, tmp_path):
        (tmp_path / "12" / "state").mkdir(parents=True)
        with pytest.raises(CheckpointError, match="holds '12', which is not a training checkpoint"):
            TrainingCheckpoints(tmp_path)
        assert names(tmp_path) == ["12"]

    def test_a_tree_without_adapters(self, saved, params, state):
        with TrainingCheckpoints(saved) as checkpoints:
            with pytest.raises(CheckpointError, match="`wrapped` has no adapters"):
                checkpoints.restore(params, state)
            with pytest.raises(CheckpointError, match="`wrapped` has no adapters"):
                checkpoints.save(6, params, state)

    def test_half_a_tree(self, saved, wrapped, state):
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(CheckpointError, match=r"at 'encoder/0/kernel'.*combine\("),
        ):
            checkpoints.save(6, lora_jax.split(wrapped)[0], state)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"rank": 3},
                "'encoder/0/kernel': its rank is 2 in the checkpoint and 3 in",
            ),
            ({"alpha": 5}, "'encoder/0/kernel': its alpha is 6.0 in the checkpoint and 5.0 in"),
            ({"freeze": "lora_A"}, r"its frozen is \(\) in the checkpoint and \('lora_A',\)"),
            (
                {"dora": True},
                r"'encoder/0/kernel': its magnitude is None in .* and float32 \(4,\) in",
            ),
            ({"dtype": jnp.bfloat16}, "its lora_A is float32 .* and bfloat16"),
            ({"axes": {"encoder/0/kernel": ("out", "in")}}, r"its axes is \('in', 'out'\) in"),
            ({"exclude": "encoder/1"}, "adapts 'encoder/1/kernel', which `wrapped` does not"),
            (
                {"train": ["head", "encoder/0/bias"]},
                "does not adapt 'encoder/0/bias', which `wrapped`",
            ),
            ({"train": None}, "adapts 'head'"),
        ],
        ids=str,
    )
    def test_another_tree(self, saved, params, state, options, message):
        other = lora_jax.wrap(
            params, **{"targets": "kernel", "rank": 2, "alpha": 6, "train": "head", **options}
        )
        before = jax.tree.map(lambda x: x, other)
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(CheckpointError, match=message),
        ):
            checkpoints.restore(other, state)
        assert_identical(other, before)

    def test_a_weight_of_another_shape(self, saved, params, state):
        params["encoder"][0]["kernel"] = jnp.ones((7, 4))
        other = lora_jax.wrap(params, "kernel", rank=2, alpha=6, train="head")
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(
                CheckpointError, match=r"'encoder/0/kernel': its shape is \(6, 4\).*\(7, 4\)"
            ),
        ):
            checkpoints.restore(other, state)

    @pytest.mark.parametrize(
        "path", ["encoder/0/kernel", "encoder/1/kernel", "encoder/0/bias", "head"]
    )
    def test_another_base(self, saved, params, state, path):
        def changed(where, leaf):
            last = (-1,) * leaf.ndim
            return leaf.at[last].add(0.01 * leaf[last] + 0.01) if where == path else leaf

        leaves = map_with_paths(changed, params)
        other = lora_jax.wrap(leaves, "kernel", rank=2, alpha=6, train="head")
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(
                CheckpointError, match=f"another model.*frozen leaf '{path}', whose numbers"
            ),
        ):
            checkpoints.restore(other, state)

    def test_one_more_frozen_leaf(self, saved, params, state):
        other = lora_jax.wrap(
            {**params, "scale": jnp.ones(3)}, "kernel", rank=2, alpha=6, train="head"
        )
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(
                CheckpointError, match="frozen leaf 'scale', which is not in the checkpoint"
            ),
        ):
            checkpoints.restore(other, state)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (
                optax.adam(1.0),
                "it has '.*/trace/.*' of shape .* where `optimizer_state` has '.*/count'",
            ),
            (optax.sgd(1.0), "it has '.*/trace/.*' of shape .* where `optimizer_state` has none"),
            (
                optax.chain(optax.sgd(1.0, 0.9), optax.scale_by_schedule(lambda _: 1.0)),
                "it has '.*/1/0/trace/.* where `optimizer_state` has '.*/0/0/trace/",
            ),
        ],
    )
    def test_another_optimiser(self, saved, wrapped, other, message):
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(CheckpointError, match=f"of another optimiser: {message}.*tx.init"),
        ):
            checkpoints.restore(wrapped, lora_jax.optimizer(other).init(wrapped))

    def test_a_state_in_another_dtype(self, saved, wrapped, state):
        other = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(CheckpointError, match="dtype float32 where .* dtype bfloat16"),
        ):
            checkpoints.restore(wrapped, other)

    def test_other_keys(self, folder, wrapped):
        with pytest.raises(CheckpointError, match="'optimizer_state/key' .*where"):
            round_trip(
                folder,
                wrapped,
                {"key": jax.random.key(0)},
                wrapped,
                {"key": jax.random.key(0, impl="rbg")},
            )

    def test_weights_that_are_only_shapes(self, saved, wrapped, state):
        abstract = jax.eval_shape(lambda: wrapped["encoder"][0]["bias"])
        wrapped["encoder"][0]["bias"] = abstract
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(CheckpointError, match="no numbers at 'encoder/0/bias'"),
        ):
            checkpoints.restore(wrapped, state)
