"""`save`: complete or not at all, and never over anything else."""

import shutil
from pathlib import Path

import pytest

import lora_jax
from lora_jax import _folders
from lora_jax.checkpoint import CheckpointError, _adapters
from tests.agreement import assert_identical
from tests.folders import contents
from tests.trained import as_if_trained


class TestSaveRefuses:
    def test_a_tree_without_adapters(self, tmp_path, params):
        with pytest.raises(CheckpointError, match=r"`wrapped` has no adapters.*wrap\("):
            lora_jax.save(tmp_path / "adapters", params)
        assert contents(tmp_path) == {}

    @pytest.mark.parametrize("half", [0, 1])
    def test_half_a_tree(self, tmp_path, wrapped, half):
        with pytest.raises(CheckpointError, match=r"at 'encoder/0/kernel'.*combine\("):
            lora_jax.save(tmp_path / "adapters", lora_jax.split(wrapped)[half])
        assert contents(tmp_path) == {}

    def test_a_taken_path(self, saved, wrapped):
        before = contents(saved)
        with pytest.raises(CheckpointError, match="holds a checkpoint.*overwrite=True"):
            lora_jax.save(saved, wrapped)
        assert contents(saved) == before

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_with_other_things(self, tmp_path, wrapped, overwrite):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(CheckpointError, match="not an adapter checkpoint"):
            lora_jax.save(tmp_path, wrapped, overwrite=overwrite)
        assert contents(tmp_path) == {"thesis.tex": b"years of work"}

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_file(self, tmp_path, wrapped, overwrite):
        (tmp_path / "notes").write_text("text")
        with pytest.raises(CheckpointError, match="not an adapter checkpoint"):
            lora_jax.save(tmp_path / "notes", wrapped, overwrite=overwrite)
        assert contents(tmp_path) == {"notes": b"text"}

    def test_a_folder_that_cannot_be_made(self, tmp_path, wrapped):
        (tmp_path / "notes").write_text("text")
        with pytest.raises(CheckpointError, match=r"notes/adapters can't be written"):
            lora_jax.save(tmp_path / "notes" / "adapters", wrapped)
        assert contents(tmp_path) == {"notes": b"text"}

    @pytest.mark.parametrize("method", ["exists", "mkdir"])
    def test_a_folder_without_permission(self, tmp_path, wrapped, monkeypatch, method):
        def refuse(*args, **kwargs):
            raise PermissionError("not yours")

        monkeypatch.setattr(Path, method, refuse)
        with pytest.raises(CheckpointError, match="can't be written: PermissionError: not yours"):
            lora_jax.save(tmp_path / "adapters", wrapped)

    def test_an_empty_folder_is_free(self, tmp_path, params, wrapped):
        lora_jax.save(tmp_path, wrapped)
        assert_identical(lora_jax.restore(tmp_path, params), wrapped)


class TestInterruptedSave:
    @pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
    @pytest.mark.parametrize(
        ("module", "step"),
        [(_adapters, "_write_arrays"), (_adapters, "_metadata_text"), (_folders, "_put_in_place")],
    )
    def test_the_old_checkpoint_survives(self, saved, wrapped, monkeypatch, module, step, failure):
        before = contents(saved)

        def fail(*args):
            raise failure

        monkeypatch.setattr(module, step, fail)
        expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            lora_jax.save(saved, as_if_trained(wrapped, seed=2), overwrite=True)
        assert contents(saved.parent) == {f"{saved.name}/{file}": x for file, x in before.items()}

    def test_nothing_is_left_at_a_new_path(self, tmp_path, wrapped, monkeypatch):
        monkeypatch.setattr(_adapters, "_metadata_text", lambda *args: 1 / 0)
        with pytest.raises(CheckpointError, match="can't be written.*ZeroDivisionError"):
            lora_jax.save(tmp_path / "adapters", wrapped)
        assert list(tmp_path.iterdir()) == []

    def test_a_swap_that_fails_is_undone(self, saved, wrapped, params, monkeypatch):
        rename = Path.rename

        def fail_into_place(self, target):
            if self.name.endswith(".unfinished"):
                raise OSError("no more renames")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail_into_place)
        with pytest.raises(CheckpointError, match="no more renames"):
            lora_jax.save(saved, as_if_trained(wrapped, seed=2), overwrite=True)
        assert_identical(lora_jax.restore(saved, params), wrapped)
        assert list(saved.parent.iterdir()) == [saved]

    def test_remains_of_a_killed_save_do_no_harm(self, saved, wrapped, params):
        shutil.copytree(saved, saved.with_name(".adapters.unfinished"))
        shutil.copytree(saved, saved.with_name(".adapters.previous"))
        newer = as_if_trained(wrapped, seed=2)
        lora_jax.save(saved, newer, overwrite=True)
        assert_identical(lora_jax.restore(saved, params), newer)
        assert list(saved.parent.iterdir()) == [saved]

    def test_a_kill_between_the_renames_is_explained(self, saved, params):
        saved.rename(saved.with_name(".adapters.previous"))
        with pytest.raises(CheckpointError, match="interrupted.*\\.adapters\\.previous: rename"):
            lora_jax.restore(saved, params)

    def test_overwriting(self, saved, params, wrapped):
        newer = as_if_trained(wrapped, seed=2)
        lora_jax.save(saved, newer, overwrite=True)
        assert_identical(lora_jax.restore(saved, params), newer)
        assert list(saved.parent.iterdir()) == [saved]
