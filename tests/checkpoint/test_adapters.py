"""`save` and `restore`: exact, complete or not at all, and clear about what does not fit."""

import json
import shutil
from pathlib import Path

import equinox as eqx
import flax.core
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lora_jax
from lora_jax import _folders
from lora_jax import init as lora_init
from lora_jax.checkpoint import FORMAT_VERSION, CheckpointError, _adapters
from lora_jax.checkpoint._files import signed_text
from tests.arrays import random
from tests.checkpoint.trees import assert_identical, contents, damage_file, no_new_threads
from tests.trained import as_if_trained


def a_dict(dtype=jnp.float32):
    return {
        "encoder": [
            {"kernel": jnp.ones((6, 4), dtype), "bias": jnp.zeros(4, dtype)},
            {"kernel": jnp.full((4, 5), 2, dtype), "bias": jnp.ones(5, dtype)},
        ],
        "head": (jnp.ones((5, 3), dtype), {"steps": jnp.arange(3)}),
    }


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


def edit_metadata(folder, change):
    """Rewrites `adapters.json` as a program might that also writes the right checksum of it."""
    file = folder / "adapters.json"
    content = json.loads(file.read_text())
    change(content)
    del content["own_crc32"]
    file.write_text(signed_text(content.pop("format"), content.pop("version"), content))


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


@pytest.fixture
def params():
    return a_dict()


@pytest.fixture
def wrapped(params):
    return as_if_trained(lora_jax.wrap(params, "kernel", rank=2, alpha=6))


@pytest.fixture
def saved(tmp_path, wrapped):
    lora_jax.save(tmp_path / "adapters", wrapped)
    return tmp_path / "adapters"


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


def test_an_adapter_that_grew_is_restored(tmp_path):
    params = {"kernel": random(12, 10)}
    wrapped = lora_jax.arithmetic.resize(lora_jax.wrap(params, "kernel", rank=2, init="pissa"), 4)
    lora_jax.save(tmp_path / "adapters", wrapped)
    assert_identical(lora_jax.restore(tmp_path / "adapters", params), wrapped)


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
        edit_metadata(saved, lambda metadata: metadata.update(version=FORMAT_VERSION + 1))
        with pytest.raises(CheckpointError, match="format version 3.*upgrade lora_jax"):
            lora_jax.restore(saved, params)

    def test_another_format(self, saved, params):
        edit_metadata(saved, lambda metadata: metadata.update(format="something else"))
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
        edit_metadata(saved, lambda it: it["weights"]["encoder/0/kernel"].update(change))
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
        edit_metadata(saved, lambda it: it["crc32"].update({name: 0}))
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

        edit_metadata(saved, rename)
        with pytest.raises(CheckpointError, match="no array 'encoder/0/kernel/scale'"):
            lora_jax.restore(saved, params)

    def test_what_orbax_cannot_read(self, saved, params):
        (saved / "arrays" / "_METADATA").write_text("{}")
        edit_metadata(saved, lambda metadata: metadata.update(crc32={}))
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
