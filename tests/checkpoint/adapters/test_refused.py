"""`restore`: clear about what is damaged and what does not fit."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.checkpoint import CheckpointError
from lora_jax.checkpoint._adapters import FORMAT_VERSION
from tests.agreement import assert_identical
from tests.checkpoint.trees import a_dict, damage_file, edit_json
from tests.folders import contents
from tests.trained import as_if_trained


class TestRestoreRefuses:
    def test_a_missing_folder(self, tmp_path, params):
        with pytest.raises(CheckpointError, match="none does not exist; expected a folder"):
            lora_jax.restore(tmp_path / "none", params)

    def test_a_folder_that_is_no_checkpoint(self, tmp_path, params):
        with pytest.raises(CheckpointError, match="not an adapter checkpoint"):
            lora_jax.restore(tmp_path, params)

    def test_a_file(self, tmp_path, params):
        (tmp_path / "notes").write_text("text")
        with pytest.raises(CheckpointError, match="not an adapter checkpoint"):
            lora_jax.restore(tmp_path / "notes", params)

    def test_a_newer_format(self, saved, params):
        edit_json(
            saved / "adapters.json", lambda metadata: metadata.update(version=FORMAT_VERSION + 1)
        )
        with pytest.raises(CheckpointError, match="format version 3.*upgrade lora_jax"):
            lora_jax.restore(saved, params)

    def test_another_format(self, saved, params):
        edit_json(
            saved / "adapters.json", lambda metadata: metadata.update(format="something else")
        )
        with pytest.raises(CheckpointError, match="format 'something else'; expected"):
            lora_jax.restore(saved, params)

    def test_wrapped_params(self, saved, wrapped):
        with pytest.raises(CheckpointError, match=r"wrapped already.*unwrap\(params\)"):
            lora_jax.restore(saved, wrapped)

    def test_a_path_that_the_params_do_not_have(self, saved, params):
        params["encoder"][1]["kernels"] = params["encoder"][1].pop("kernel")
        with pytest.raises(
            CheckpointError, match="'encoder/1/kernel'.*nearest paths are 'encoder/1/kernels'"
        ):
            lora_jax.restore(saved, params)

    def test_a_shape(self, saved, params):
        params["encoder"][1]["kernel"] = jnp.ones((4, 7))
        with pytest.raises(CheckpointError, match=r"'encoder/1/kernel'.*\(4, 5\) there.*\(4, 7\)"):
            lora_jax.restore(saved, params)

    def test_a_leaf_that_is_no_array(self, saved, params):
        params["encoder"][1]["kernel"] = 0.5
        with pytest.raises(CheckpointError, match="'encoder/1/kernel'"):
            lora_jax.restore(saved, params)

    def test_a_weight_trained_in_full_in_another_dtype(self, tmp_path, params):
        wrapped = lora_jax.wrap(params, "kernel", rank=2, train="head/0")
        lora_jax.save(tmp_path / "adapters", wrapped)
        with pytest.raises(CheckpointError, match=r"'head/0'.*float32.*bfloat16.*astype"):
            lora_jax.restore(tmp_path / "adapters", a_dict(jnp.bfloat16))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rank": 3}, r"'encoder/0/kernel'.*lora_A has shape \(6, 2\); expected \(6, 3\)"),
            ({"axes": ["out", "in"]}, r"'encoder/0/kernel'.*lora_A has shape \(6, 2\)"),
            ({"axes": ["in", "out", "out"]}, "'encoder/0/kernel'.*its axes are"),
            ({"rank": None}, "'encoder/0/kernel'.*its rank None"),
            ({"kind": "Unheard"}, "damaged.*Unheard"),
            ({"arrays": {}}, "damaged.*lora_A"),
            ({"arrays": None}, "damaged"),
            ({"layers": [0]}, "'encoder/0/kernel'.*it adapts the layers"),
            ({"more": 1}, "damaged.*more"),
        ],
    )
    def test_metadata_that_do_not_fit(self, saved, params, change, message):
        edit_json(
            saved / "adapters.json", lambda it: it["weights"]["encoder/0/kernel"].update(change)
        )
        with pytest.raises(CheckpointError, match=message):
            lora_jax.restore(saved, params)

    @pytest.mark.parametrize("end", [0, 1, 0.25, 0.5, 0.75, 0.99])
    def test_truncated_metadata(self, saved, params, end):
        file = saved / "adapters.json"
        content = file.read_bytes()
        file.write_bytes(content[: int(end * len(content)) if end != 1 else -1])
        with pytest.raises(CheckpointError, match="damaged"):
            lora_jax.restore(saved, params)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", "null", "{", '{"format": "lora_jax adapters"}']
    )
    def test_metadata_that_are_not_metadata(self, saved, params, text):
        (saved / "adapters.json").write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
            lora_jax.restore(saved, params)

    @pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
    def test_a_changed_digit_in_the_metadata(self, saved, params, place):
        file = saved / "adapters.json"
        text = file.read_text()
        digit = next(i for i in range(int(place * len(text)), len(text)) if text[i] in "123456")
        file.write_text(f"{text[:digit]}{int(text[digit]) + 1}{text[digit + 1 :]}")
        with pytest.raises(CheckpointError, match=r"damaged.*adapters\.json is not as it was"):
            lora_jax.restore(saved, params)

    def test_metadata_of_a_version_without_a_checksum_of_them(self, saved, params, wrapped):
        file = saved / "adapters.json"
        metadata = json.loads(file.read_text())
        del metadata["own_crc32"]
        file.write_text(json.dumps(metadata))
        assert_identical(lora_jax.restore(saved, params), wrapped)

    @pytest.mark.parametrize(
        "name",
        [
            "../outside",
            "arrays/../../outside",
            "{}/outside",
            r"arrays\..\..\outside",
            r"C:\outside",
        ],
    )
    def test_a_file_outside_of_the_folder_is_not_read(self, saved, params, name, monkeypatch):
        (saved.parent / "outside").write_text("a secret")
        name = name.format(saved.parent)
        edit_json(saved / "adapters.json", lambda it: it["crc32"].update({name: 0}))
        opened, original = [], Path.open
        monkeypatch.setattr(
            Path,
            "open",
            lambda self, *args, **options: opened.append(self) or original(self, *args, **options),
        )
        with pytest.raises(CheckpointError, match="names the file .*outside.* nothing was read"):
            lora_jax.restore(saved, params)
        assert opened == [saved / "adapters.json"]

    def test_arrays_of_another_checkpoint(self, saved, params, wrapped):
        other = saved.with_name("other")
        lora_jax.save(other, as_if_trained(wrapped, seed=2))
        shutil.rmtree(saved / "arrays")
        shutil.copytree(other / "arrays", saved / "arrays")
        with pytest.raises(CheckpointError, match="damaged"):
            lora_jax.restore(saved, params)

    def test_arrays_that_the_metadata_do_not_know(self, saved, params):
        def rename(metadata):
            arrays = metadata["weights"]["encoder/0/kernel"]["arrays"]
            arrays["scale"]["dtype"] = "bfloat16"

        edit_json(saved / "adapters.json", rename)
        with pytest.raises(CheckpointError, match="no array 'encoder/0/kernel/scale'"):
            lora_jax.restore(saved, params)

    def test_what_orbax_cannot_read(self, saved, params):
        (saved / "arrays" / "_METADATA").write_text("{}")
        edit_json(saved / "adapters.json", lambda metadata: metadata.update(crc32={}))
        with pytest.raises(CheckpointError, match=r"damaged.*: \w+: "):
            lora_jax.restore(saved, params)

    @pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "deleted"])
    def test_every_damaged_file(self, saved, params, wrapped, damage):
        files = contents(saved)
        del files["adapters.json"]  # its damages have tests of their own
        for name, original in files.items():
            file = saved / name
            damage_file(file, original, damage)
            with pytest.raises(CheckpointError, match=f"{saved} is damaged.*{name}"):
                lora_jax.restore(saved, params)
            file.write_bytes(original)
        assert_identical(lora_jax.restore(saved, params), wrapped)

    def test_params_are_left_alone(self, saved, params):
        (saved / "arrays" / "_METADATA").unlink()
        before = jax.tree.map(lambda x: x, params)
        with pytest.raises(CheckpointError):
            lora_jax.restore(saved, params)
        assert_identical(params, before)
