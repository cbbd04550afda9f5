"""What `save` writes, and what it refuses to write."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax
from lora_jax import CheckpointError, _folders
from lora_jax.exchange.peft import Rule, _files, load, read_config, save
from tests.agreement import assert_identical
from tests.exchange.peft.files import NAMES, params, tensors_of, wrapped
from tests.exchange.peft.models import LAYERS, WIDTH
from tests.folders import contents
from tests.trained import as_if_trained


class TestWrittenFiles:
    def wrapped(self, **settings):
        params = {"layers": jnp.ones((LAYERS, WIDTH, WIDTH)), "head": jnp.ones((WIDTH, 2))}
        return lora_jax.wrap(
            params, "layers", rank=2, axes={"layers": ("batch", "in", "out")}, **settings
        )

    names = (Rule("layers.{n}.dense.weight", "layers"), Rule("head.weight", "head"))

    def test_config(self, tmp_path):
        save(tmp_path / "adapter", self.wrapped(alpha=3), names=self.names)
        config = read_config(tmp_path / "adapter")
        assert config["peft_type"] == "LORA"
        assert (config["r"], config["lora_alpha"]) == (2, 3)
        assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
        assert config["target_modules"] == [f"layers.{n}.dense" for n in range(LAYERS)]
        assert (config["modules_to_save"], config["bias"]) == (None, "none")
        assert (config["use_dora"], config["use_rslora"], config["fan_in_fan_out"]) == (False,) * 3
        assert "target_parameters" not in config

    def test_patterns_for_what_differs(self, tmp_path):
        params = {name: jnp.ones((4, 4)) for name in "abc"}
        targets = {"a": {"rank": 3, "alpha": 3}, "[bc]": {"rank": 2, "alpha": 5}}
        wrapped = lora_jax.wrap(params, targets)
        save(tmp_path / "adapter", wrapped, names=[Rule("x.{n}.weight", "{n}")])
        config = read_config(tmp_path / "adapter")
        assert (config["r"], config["rank_pattern"]) == (2, {r"^x\.a": 3})
        assert (config["lora_alpha"], config["alpha_pattern"]) == (5, {r"^x\.a": 3})

    def test_rslora_where_the_config_has_it(self, tmp_path):
        wrapped = self.wrapped(alpha=3, rslora=True)
        save(tmp_path / "adapter", wrapped, names=self.names, config={"use_rslora": True})
        assert read_config(tmp_path / "adapter")["lora_alpha"] == 3
        params = lora_jax.unwrap(wrapped)
        loaded = load(tmp_path / "adapter", params, names=self.names)
        assert loaded["layers"].scale == wrapped["layers"].scale

    def test_unknown_keys_go_there_and_back(self, tmp_path):
        config = {
            "base_model_name_or_path": "someone/model",
            "auto_mapping": {"base_model_class": "os.system", "parent_library": "antigravity"},
            "from_the_future": {"list": [1, None, "é"]},
            "lora_dropout": 0.1,
            "layers_to_transform": [0],
            "exclude_modules": ["dense"],
        }
        save(tmp_path / "one", self.wrapped(), names=self.names, config=config)
        save(
            tmp_path / "two", self.wrapped(), names=self.names, config=read_config(tmp_path / "one")
        )
        assert read_config(tmp_path / "one") == read_config(tmp_path / "two")
        kept = read_config(tmp_path / "two")
        for key in ("base_model_name_or_path", "auto_mapping", "from_the_future", "lora_dropout"):
            assert kept[key] == config[key]
        # All adapted modules are named, so that nothing else chooses among them.
        assert not {"layers_to_transform", "exclude_modules"} & set(kept)
        assert "antigravity" not in sys.modules

    def test_names_that_end_alike(self, tmp_path):
        """In a list, PEFT would take `dense` for `other.dense` as well."""
        params = {"dense": jnp.ones((4, 4)), "other": {"dense": jnp.ones((4, 4))}}
        wrapped = lora_jax.wrap(params, lambda path, leaf: path == "dense", rank=2)
        names = [Rule("{module}.weight", "{module:.+}")]
        save(tmp_path / "adapter", wrapped, names=names)
        assert read_config(tmp_path / "adapter")["target_modules"] == "dense"

    def test_modules_that_peft_would_take_too(self, tmp_path):
        """An entry of `modules_to_save` may begin in the middle of a name."""
        params = {name: jnp.ones((4, 4)) for name in ("dense", "head", "pre_head")}
        wrapped = lora_jax.wrap(params, "dense", rank=2, train="head")
        save(tmp_path / "adapter", wrapped, names=[Rule("{n}.weight", "{n}")])
        tensors = tensors_of(tmp_path / "adapter")
        assert read_config(tmp_path / "adapter")["modules_to_save"] == ["head"]
        assert np.array_equal(tensors["pre_head.weight"], np.ones((4, 4)))

    def test_a_module_trains_as_a_whole(self, tmp_path):
        params = {"q": jnp.ones((4, 4)), "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
        wrapped = lora_jax.wrap(params, "q", rank=2, train="head/kernel")
        names = [
            Rule("q.weight", "q"),
            Rule("head.weight", "head/kernel"),
            Rule("head.bias", "head/bias"),
        ]
        save(tmp_path / "adapter", wrapped, names=names)
        assert {"head.weight", "head.bias"} < set(tensors_of(tmp_path / "adapter"))

    def test_a_single_number(self, tmp_path):
        params = {"q": jnp.ones((4, 4)), "temperature": jnp.ones(())}
        wrapped = as_if_trained(lora_jax.wrap(params, "q", rank=2, train="temperature"))
        names = [Rule("q.weight", "q"), Rule("head.temperature", "temperature", kind="array")]
        save(tmp_path / "adapter", wrapped, names=names)
        assert tensors_of(tmp_path / "adapter")["head.temperature"].shape == ()
        assert_identical(load(tmp_path / "adapter", params, names=names), wrapped)

    def test_tensors_are_contiguous_and_in_dtype(self, tmp_path):
        save(tmp_path / "adapter", self.wrapped(dtype=jnp.bfloat16), names=self.names)
        dtypes = {tensor.dtype for tensor in tensors_of(tmp_path / "adapter").values()}
        assert dtypes == {np.dtype(ml_dtypes.bfloat16)}

    def test_nothing_but_two_files(self, tmp_path):
        save(tmp_path / "runs" / "adapter", self.wrapped(), names=self.names)
        files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*"))
        assert [Path(file).name for file in files] == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]

    def test_overwriting(self, tmp_path):
        save(tmp_path / "adapter", self.wrapped(), names=self.names)
        newer = as_if_trained(self.wrapped())
        save(tmp_path / "adapter", newer, names=self.names, overwrite=True)
        loaded = load(tmp_path / "adapter", lora_jax.unwrap(newer), names=self.names)
        assert_identical(loaded, newer)
        assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]

    @pytest.mark.parametrize("scale", [0.0, -1.5, 1e-30, 3.4e38, 1 / 7, 0.1])
    @pytest.mark.parametrize("rank", [1, 3, 7])
    @pytest.mark.parametrize("rslora", [False, True])
    def test_every_scale_is_exact(self, tmp_path, scale, rank, rslora):
        wrapped = lora_jax.wrap({"a": jnp.ones((8, 8))}, "a", rank=rank)
        node = dataclasses.replace(wrapped["a"], scale=jnp.float32(scale))
        names = [Rule("a.weight", "a")]
        save(tmp_path / "x", {"a": node}, names=names, config={"use_rslora": rslora})
        loaded = load(tmp_path / "x", {"a": node.base}, names=names)
        assert loaded["a"].scale == np.float32(scale)


class TestSaveRefuses:
    def refused(self, tmp_path, match, tree, names=NAMES, **options):
        with pytest.raises(CheckpointError, match=match):
            save(tmp_path / "new", tree, names=names, **options)
        assert not (tmp_path / "new").exists()

    def test_a_tree_without_adapters(self, tmp_path):
        self.refused(tmp_path, r"`wrapped` has no adapters.*wrap\(", params())

    def test_weights_trained_in_full_alone(self, tmp_path):
        adapted = wrapped(train="bias")
        adapted["a"]["q"]["kernel"] = adapted["a"]["q"]["kernel"].base
        self.refused(tmp_path, "no low-rank adapters, which PEFT needs", adapted)

    @pytest.mark.parametrize("half", [0, 1])
    def test_half_a_tree(self, tmp_path, half):
        self.refused(tmp_path, r"at 'a/q/kernel'.*combine\(", lora_jax.split(wrapped())[half])

    def test_a_node_without_a_rule(self, tmp_path):
        names = [Rule("x.weight", "x")]
        self.refused(tmp_path, r"no rule for 'a/q/kernel'.*Rule\('PYTORCH", wrapped(), names)

    @pytest.mark.parametrize("name", ["q.matrix", "weight", "q"])
    def test_a_name_that_peft_cannot_adapt(self, tmp_path, name):
        names = [Rule(name, "a/q/kernel")]
        self.refused(tmp_path, f"'{name}'; PEFT adapts a module's weight", wrapped(), names)

    def test_a_parameter_without_a_module(self, tmp_path):
        names = [Rule("q", "a/q/kernel", kind="parameter")]
        self.refused(tmp_path, "'q' has no module", wrapped(), names)

    def test_a_trained_parameter_without_a_module(self, tmp_path):
        names = [Rule("a.q.weight", "a/q/kernel"), Rule("offset", "a/q/bias")]
        self.refused(
            tmp_path, "'offset' in full, a parameter without", wrapped(train="bias"), names
        )

    def test_an_array(self, tmp_path):
        names = [Rule("q.weight", "a/q/kernel", kind="array")]
        self.refused(tmp_path, "has the kind 'array'", wrapped(), names)

    def test_values_that_are_not_finite(self, tmp_path):
        adapters, frozen = lora_jax.split(wrapped())
        broken = lora_jax.combine(jax.tree.map(lambda x: x.at[0].set(jnp.nan), adapters), frozen)
        self.refused(tmp_path, "'.*a.q.lora_A.weight' that are not finite", broken)

    def test_a_scale_that_is_not_finite(self, tmp_path):
        broken = jax.tree.map(lambda x: x * jnp.inf if x.ndim == 0 else x, wrapped())
        self.refused(tmp_path, "the scale inf at 'a/q/kernel'", broken)

    def test_stacked_adapters(self, tmp_path):
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), lora_jax.split(wrapped())[0])
        tree = lora_jax.combine(stacked, lora_jax.split(wrapped())[1])
        self.refused(tmp_path, "Of a bank, save one adapter at a time", tree)

    def test_magnitudes_in_some_places(self, tmp_path):
        tree = {"b": jnp.ones((3, 3)), "c": jnp.ones((3, 3))}
        adapted = lora_jax.wrap(tree, {"b": {"dora": True}, "c": {}}, rank=1)
        names = [Rule("{n}.weight", "{n}")]
        self.refused(tmp_path, r"DoRA\) in some weights and none at 'c'", adapted, names)

    def test_magnitudes_of_parameters(self, tmp_path):
        names = [Rule("a.q", "a/q/kernel", kind="parameter")]
        self.refused(tmp_path, r"no DoRA for parameters", wrapped(dora=True), names)

    def test_some_experts(self, tmp_path):
        axes = ("batch", "in", "out")
        adapted = lora_jax.wrap(
            {"up": jnp.ones((4, 3, 3))}, "up", rank=1, axes={"up": axes}, layers=(0,)
        )
        names = [Rule("experts.up", "up", kind="parameter", axes=axes)]
        self.refused(tmp_path, "adapts all experts of a parameter or none", adapted, names)

    def test_a_dropout_of_parameters(self, tmp_path):
        names = [Rule("a.q", "a/q/kernel", kind="parameter")]
        config = {"lora_dropout": 0.1}
        self.refused(tmp_path, "no dropout.*'lora_dropout': 0.0", wrapped(), names, config=config)

    def test_parameters_in_an_order_that_is_not_known(self, tmp_path):
        tree = {"up": jnp.ones((3, 3)), "down": jnp.ones((3, 3))}
        names = [Rule("x.{n}", "{n}", kind="parameter")]
        adapted = lora_jax.wrap(tree, ["up", "down"], rank=1)
        self.refused(tmp_path, "share the rule 'x.{n}'; expected a rule for each", adapted, names)

    def test_a_module_that_is_adapted_and_trained(self, tmp_path):
        names = [Rule("a.q.weight", "a/q/kernel"), Rule("a.offset", "a/q/bias")]
        adapted = wrapped(train="bias")
        self.refused(tmp_path, "in a module that trains in full: `modules_to_save`", adapted, names)

    @pytest.mark.wrong_types
    def test_a_config_that_is_none(self, tmp_path):
        with pytest.raises(TypeError, match="`config` is 3; expected a mapping"):
            save(tmp_path / "new", wrapped(), names=NAMES, config=3)

    def test_a_taken_path(self, adapter):
        before = contents(adapter)
        with pytest.raises(CheckpointError, match="holds an adapter; save.*overwrite=True"):
            save(adapter, wrapped(), names=NAMES)
        assert contents(adapter) == before

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_with_other_things(self, adapter, overwrite):
        (adapter / "README.md").write_text("years of work")
        before = contents(adapter)
        with pytest.raises(CheckpointError, match="holds 'README.md', which is not part"):
            save(adapter, wrapped(), names=NAMES, overwrite=overwrite)
        assert contents(adapter) == before

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "new").write_text("text")
        with pytest.raises(CheckpointError, match="'new', which is not part of an adapter"):
            save(tmp_path / "new", wrapped(), names=NAMES, overwrite=True)

    @pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
    @pytest.mark.parametrize(
        ("module", "step"), [(_files, "write_tensors"), (_folders, "_put_in_place")]
    )
    def test_an_interrupted_save(self, adapter, monkeypatch, module, step, failure):
        before = contents(adapter.parent)

        def fail(*args):
            raise failure

        monkeypatch.setattr(module, step, fail)
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            save(adapter, wrapped(), names=NAMES, overwrite=True)
        assert contents(adapter.parent) == before

    def test_a_config_that_json_cannot_say(self, adapter):
        before = contents(adapter.parent)
        with pytest.raises(CheckpointError, match="can't be written: TypeError"):
            save(adapter, wrapped(), names=NAMES, overwrite=True, config={"x": object()})
        assert contents(adapter.parent) == before
