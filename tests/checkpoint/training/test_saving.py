"""`TrainingCheckpoints`: which steps are saved and kept, and what a failure leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.checkpoint import CheckpointError, TrainingCheckpoints, _state
from tests.agreement import assert_identical
from tests.checkpoint.training.running import names
from tests.checkpoint.trees import no_new_threads
from tests.trained import as_if_trained


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
