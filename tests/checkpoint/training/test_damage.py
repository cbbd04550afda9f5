"""`TrainingCheckpoints`: every damage of a file is found, and the error says how to go on."""

import contextlib
import json
import shutil

import pytest

from lora_jax.checkpoint import CheckpointError, TrainingCheckpoints
from tests.agreement import assert_identical
from tests.checkpoint.trees import damage_file, edit_json
from tests.folders import contents
from tests.trained import as_if_trained


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
        edit_json(saved / "4" / "training.json", lambda content: content["crc32"].update({name: 0}))
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
