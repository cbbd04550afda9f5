"""`TrainingCheckpoints`: exact, kept as asked, and clear about what does not fit."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax._paths import map_with_paths
from lora_jax.checkpoint import CheckpointError, TrainingCheckpoints, _state
from lora_jax.checkpoint._files import signed_text
from tests.arrays import random
from tests.checkpoint.trees import assert_identical, contents, damage_file, no_new_threads
from tests.trained import as_if_trained


@pytest.fixture
def params():
    return {
        "encoder": [
            {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)},
            {"kernel": jnp.full((4, 5), 2, jnp.bfloat16), "bias": jnp.ones(5)},
        ],
        "head": jnp.ones((5, 3)),
    }


@pytest.fixture
def fresh(params):
    return lora_jax.wrap(params, "kernel", rank=2, alpha=6, train="head")


@pytest.fixture
def tx():
    return lora_jax.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1, 0.9)))


@pytest.fixture
def wrapped(fresh):
    return as_if_trained(fresh)


@pytest.fixture
def state(tx, wrapped):
    return trained_state(tx.init(wrapped))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def saved(folder, wrapped, state):
    """A folder with the steps 2 and 4."""
    with TrainingCheckpoints(folder) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, wrapped, state, data_position=step)
    return folder


def trained_state(state, seed=7):
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [jax.random.normal(key, x.shape).astype(x.dtype) for key, x in zip(keys, leaves)]  # noqa: B905
    return jax.tree.unflatten(structure, noise)


def round_trip(folder, wrapped, state, *into, **what):
    with TrainingCheckpoints(folder) as checkpoints:
        checkpoints.save(1, wrapped, state, **what)
    with TrainingCheckpoints(folder) as checkpoints:
        return checkpoints.restore(*(into or (wrapped, state)))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def edit_description(folder, change):
    file = folder / "training.json"
    content = json.loads(file.read_text())
    change(content)
    del content["own_crc32"]
    file.write_text(signed_text(content.pop("format"), content.pop("version"), content))


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


class TestSaving:
    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_what_is_donated_right_after(self, folder, asynchronous):
        """Both trees are overwritten in place while the checkpoint is being written."""
        wrapped = as_if_trained(lora_jax.wrap({"kernel": jnp.ones((2000, 500))}, "kernel", rank=64))
        state = {"mu": jnp.arange(1e6), "host": np.arange(1e6)}
        expected = jax.tree.map(np.array, (wrapped, state))
        step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
        with TrainingCheckpoints(folder, asynchronous=asynchronous) as checkpoints:
            checkpoints.save(1, wrapped, state)
            donated = wrapped["kernel"].lora_A, state["mu"]
            state["host"][:] = -1
            for _ in range(3):
                donated = step(donated)
            template = lora_jax.wrap({"kernel": jnp.ones((2000, 500))}, "kernel", rank=64)
            target = {"mu": jnp.zeros(10**6), "host": np.zeros(10**6)}
            restored = checkpoints.restore(template, target)
        if not asynchronous:  # while it is being read, JAX lets it live and donates nothing
            assert wrapped["kernel"].lora_A.is_deleted()
        assert_identical((restored.wrapped, restored.optimizer_state), expected)

    def test_the_latest_are_kept(self, folder, wrapped):
        with TrainingCheckpoints(folder, keep=2) as checkpoints:
            for step in range(1, 6):
                assert checkpoints.save(step, wrapped, ())
            assert checkpoints.steps == (4, 5)
            assert checkpoints.latest_step == 5
        assert names(folder) == ["4", "5"]

    def test_all_are_kept(self, folder, wrapped):
        with TrainingCheckpoints(folder, keep=None) as checkpoints:
            for step in range(1, 5):
                checkpoints.save(step, wrapped, ())
        assert names(folder) == ["1", "2", "3", "4"]

    @pytest.mark.parametrize(
        ("mode", "values", "expected", "kept"),
        [
            ("min", [3, 1, 2, 4], 2, ["2", "4"]),
            ("max", [3, 9, 2, 4], 2, ["2", "4"]),
            ("min", [1, 1, 2, 4], 2, ["2", "4"]),
            ("min", [np.nan, 1, np.nan, np.nan], 2, ["2", "4"]),
            ("max", [np.inf, 1, np.nan, 3], 1, ["1", "4"]),
            ("min", [np.nan] * 4, 4, ["4"]),
            ("min", [4, 3, 2, 1], 4, ["4"]),
        ],
    )
    def test_the_best_is_kept(self, folder, wrapped, mode, values, expected, kept):
        options = {"keep": 1, "best": "loss", "mode": mode}
        for step, value in enumerate(values, start=1):
            # Anew each time: a run that goes on knows the metrics of the one before.
            with TrainingCheckpoints(folder, **options) as checkpoints:
                checkpoints.save(step, wrapped, (), metrics={"loss": jnp.float32(value)})
        with TrainingCheckpoints(folder, **options) as checkpoints:
            assert checkpoints.best_step == expected
        assert names(folder) == kept

    def test_every(self, folder, wrapped):
        with TrainingCheckpoints(folder, every=3) as checkpoints:
            written = [
                step for step in range(1, 9) if checkpoints.save(step, wrapped, (), force=step == 8)
            ]
            assert written == [3, 6, 8]
            assert checkpoints.steps == (3, 6, 8)

    def test_reading_leaves_alone_what_is_being_written(self, saved, wrapped, state):
        (saved / "6.orbax-checkpoint-tmp").mkdir()
        (saved / ".deleted" / "0").mkdir(parents=True)
        with TrainingCheckpoints(saved) as checkpoints:
            assert checkpoints.steps == (2, 4)
            assert checkpoints.restore(wrapped, state).step == 4
        assert names(saved) == [".deleted", "2", "4", "6.orbax-checkpoint-tmp"]

    def test_what_a_killed_run_left_is_removed(self, saved, wrapped, state):
        (saved / "3.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
        (saved / "6.orbax-checkpoint-tmp").mkdir()
        (saved / ".deleted" / "2").mkdir(parents=True)
        with TrainingCheckpoints(saved, keep=1) as checkpoints:
            checkpoints.save(6, wrapped, state)
        assert names(saved) == ["6"]

    def test_a_folder_without_checkpoints(self, folder, wrapped):
        with TrainingCheckpoints(folder, best="loss") as checkpoints:
            assert (checkpoints.steps, checkpoints.latest_step, checkpoints.best_step) == (
                (),
                None,
                None,
            )
            with pytest.raises(CheckpointError, match=r"`step` is None.*checkpoint are \[\]"):
                checkpoints.restore(wrapped, ())
        assert not folder.exists()

    def test_going_on_from_an_earlier_step(self, saved, wrapped, state):
        with TrainingCheckpoints(saved) as checkpoints:
            assert checkpoints.restore(wrapped, state, step=2).data_position == 2
            for step in (3, 4):
                with pytest.raises(
                    CheckpointError, match=r"`step` is .*of step 4.*delete_after\(step\)"
                ):
                    checkpoints.save(step, wrapped, state)
            checkpoints.delete_after(2)
            assert checkpoints.steps == (2,)
            for step in (3, 4):
                checkpoints.save(step, wrapped, state, data_position="new")
            checkpoints.delete_after(3)
            checkpoints.save(4, wrapped, state, data_position="newest")
        with TrainingCheckpoints(saved) as checkpoints:
            assert checkpoints.restore(wrapped, state).data_position == "newest"
        assert names(saved) == ["2", "3", "4"]


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


class TestDamage:
    @pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "deleted"])
    def test_every_file_of_the_latest(self, saved, wrapped, state, damage):
        for name, original in contents(saved / "4").items():
            damage_file(saved / "4" / name, original, damage)
            own = name.startswith("arrays/") or name == "training.json"
            refused = pytest.raises(CheckpointError, match="4' is|4 is damaged|'4', which")
            with (
                refused if own else contextlib.nullcontext(),
                TrainingCheckpoints(saved, best="loss") as checkpoints,
            ):
                assert checkpoints.restore(wrapped, state, step=2).step == 2
                assert_identical(checkpoints.restore(wrapped, state).wrapped, wrapped)
            (saved / "4" / name).write_bytes(original)
        with TrainingCheckpoints(saved) as checkpoints:
            assert_identical(checkpoints.restore(wrapped, state).optimizer_state, state)

    def test_the_error_says_how_to_go_on(self, saved, wrapped, state):
        for step in (4, 2):
            file = next(file for file in (saved / str(step) / "arrays" / "d").iterdir())
            damage_file(file, file.read_bytes(), "flipped")
        with TrainingCheckpoints(saved) as checkpoints:
            with pytest.raises(CheckpointError) as later:
                checkpoints.restore(wrapped, state)
            with pytest.raises(CheckpointError) as first:
                checkpoints.restore(wrapped, state, step=2)
        assert "4 is damaged, restore(wrapped, optimizer_state, step=2)" in str(later.value)
        assert "delete_after(2)" in str(later.value)
        assert "arrays/d/" in str(later.value)
        assert "2 is damaged, there is none before it" in str(first.value)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", "null", "{", '{"format": "lora_jax training"}']
    )
    def test_a_description_that_is_none(self, saved, wrapped, state, text):
        (saved / "4" / "training.json").write_text(text)
        with (
            TrainingCheckpoints(saved, best="loss") as checkpoints,
            pytest.raises(CheckpointError, match="4 is damaged"),
        ):
            checkpoints.restore(wrapped, state)

    def test_a_changed_number_in_the_data_position(self, saved, wrapped, state):
        file = saved / "4" / "training.json"
        file.write_text(file.read_text().replace('"data_position": 4', '"data_position": 5'))
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(CheckpointError, match="training.json is not as it was saved"),
        ):
            checkpoints.restore(wrapped, state)

    @pytest.mark.parametrize("name", ["../../outside", "/etc/passwd"])
    def test_a_file_outside_of_the_folder_is_not_read(self, saved, wrapped, state, name):
        edit_description(saved / "4", lambda content: content["crc32"].update({name: 0}))
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(CheckpointError, match=f"names the file '{name}'.* nothing was read"),
        ):
            checkpoints.restore(wrapped, state)

    def test_a_newer_format(self, saved, wrapped, state):
        file = saved / "4" / "training.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "version": 2}))
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(CheckpointError, match="format version 2.*upgrade lora_jax"),
        ):
            checkpoints.restore(wrapped, state)

    def test_another_format(self, saved, wrapped, state):
        edit = {"format": "something else"}
        file = saved / "4" / "training.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **edit}))
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(CheckpointError, match="format 'something else'; expected"),
        ):
            checkpoints.restore(wrapped, state)

    def test_arrays_of_another_step(self, saved, wrapped, state):
        with TrainingCheckpoints(saved) as checkpoints:
            checkpoints.save(5, as_if_trained(wrapped, seed=9), state)
        shutil.rmtree(saved / "4" / "arrays")
        shutil.copytree(saved / "5" / "arrays", saved / "4" / "arrays")
        with (
            TrainingCheckpoints(saved) as checkpoints,
            pytest.raises(CheckpointError, match="4 is damaged"),
        ):
            checkpoints.restore(wrapped, state, step=4)


class TestFailedSave:
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_the_next_call_says_so_and_the_steps_before_are_kept(
        self, saved, wrapped, state, monkeypatch
    ):
        def fail(*args):
            raise OSError("disk full")

        with TrainingCheckpoints(saved, keep=1) as checkpoints:
            with monkeypatch.context() as broken:
                broken.setattr(_state, "file_checksums", fail)
                checkpoints.save(6, wrapped, state)
                with pytest.raises(CheckpointError, match="6 can't be written: OSError: disk full"):
                    checkpoints.wait()
            assert checkpoints.steps == (2, 4)
            assert checkpoints.restore(wrapped, state).step == 4
            checkpoints.save(7, wrapped, state)
        assert names(saved) == ["7"]

    def test_closing_says_so_and_ends_all_threads(self, saved, wrapped, state, monkeypatch):
        def fail(*args):
            raise OSError("disk full")

        monkeypatch.setattr(_state, "file_checksums", fail)
        with (
            no_new_threads(),
            pytest.raises(CheckpointError, match="6 can't be written: OSError: disk full"),
            TrainingCheckpoints(saved) as checkpoints,
        ):
            checkpoints.save(6, wrapped, state)
        with TrainingCheckpoints(saved) as checkpoints:
            assert checkpoints.steps == (2, 4)

    def test_a_folder_without_permission(self, tmp_path, wrapped):
        (tmp_path / "notes").write_text("text")
        with (
            TrainingCheckpoints(tmp_path / "notes" / "run") as checkpoints,
            pytest.raises(CheckpointError, match="run/1 can't be written"),
        ):
            checkpoints.save(1, wrapped, ())
