"""Rules: those that don't fit, what a dry run says of them, and those of a whole model."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.exchange.peft import Rule, load, preview, save
from tests.exchange.peft.files import NAMES, TENSORS, numbers, params, refused, write_adapter
from tests.exchange.peft.models import MODELS
from tests.trained import as_if_trained


class TestRules:
    @pytest.mark.parametrize(
        ("arguments", "options", "match"),
        [
            (("a.weight", "a"), {"kind": "dense"}, "`kind` is 'dense'.*expected one of 'linear'"),
            (("a.weight", "{n}/a"), {}, "has 'n' in its path"),
            (("a.weight", "a"), {"kind": "conv", "transposed": True}, "`transposed` is True"),
            (("{n:(}.weight", "{n}"), {}, "not a regular expression"),
        ],
    )
    @pytest.mark.wrong_types
    def test_that_contradict_themselves(self, arguments, options, match):
        with pytest.raises(ValueError, match=match):
            Rule(*arguments, **options)

    @pytest.mark.wrong_types
    @pytest.mark.parametrize("names", [None, "a -> b", [("a", "b")], {"a": "b"}])
    def test_that_are_none(self, adapter, names):
        with pytest.raises(TypeError, match="expected a sequence of rules"):
            load(adapter, params(), names=names)

    def test_the_first_one_that_a_path_has_counts(self):
        one, every = Rule("own.weight", "a/kernel"), Rule("{layer}.weight", "{layer}/kernel")
        other = Rule("other.weight", "a/kernel")
        tree = {"a": {"kernel": jnp.ones((4, 3))}, "b": {"kernel": jnp.ones((4, 3))}}
        for names, expected in (
            ([one, every], ["own.weight", "b.weight"]),
            ([every, one], ["a.weight", "b.weight"]),
            ([other, one, every], ["other.weight", "b.weight"]),
        ):
            assert [row[0] for row in preview(tree, names=names).rows] == expected

    def test_a_rule_for_each_leaf_is_found_by_its_path(self, monkeypatch):
        names = [Rule(f"layers.{n}.weight", f"layer_{n}/kernel") for n in range(50)]
        tree = {f"layer_{n}": {"kernel": jnp.ones((4, 3))} for n in range(50)}
        looked = []
        monkeypatch.setattr(Rule, "fields_of", lambda self, path: looked.append(path))
        assert len(preview(tree, names=names).rows) == 50
        assert not looked

    def test_that_give_two_leaves_one_name(self):
        names = [Rule("x.weight", "a"), Rule("x.weight", "b")]
        with pytest.raises(ValueError, match="'a' and 'b' the same PyTorch name 'x.weight'"):
            preview({"a": jnp.ones(2), "b": jnp.ones(2)}, names=names)

    def test_that_stack_a_leaf_without_a_batch_axis(self):
        rule = Rule("{n}.weight", "a", axes=("in", "out"))
        with pytest.raises(ValueError, match="a batch axis for each field.*'n'"):
            preview({"a": jnp.ones((2, 2))}, names=[rule])

    def test_that_name_the_places_of_a_stack(self, tmp_path):
        axes = ("batch", "in", "out")
        rule = Rule("{layer}.{name:k|v}_proj.weight", "{layer}/key_value", axes=axes)
        assert rule.fields_at((1,)) == {"name": "v"}
        params = {"0": {"key_value": jnp.ones((2, 4, 3))}}
        adapted = as_if_trained(lora_jax.wrap(params, "key_value", rank=2, axes={".*": axes}))
        save(tmp_path / "adapter", adapted, names=[rule])
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["target_modules"] == ["0.k_proj", "0.v_proj"]
        loaded = load(tmp_path / "adapter", params, names=[rule])
        jax.tree.map(np.testing.assert_array_equal, loaded, adapted)

    def test_that_name_other_places_than_there_are(self):
        rule = Rule("{name:k|v}.weight", "a", axes=("batch", "in", "out"))
        with pytest.raises(ValueError, match=r"axis 0 has 3 places; expected one for.*'k', 'v'"):
            preview({"a": jnp.ones((3, 2, 2))}, names=[rule])

    @pytest.mark.parametrize(
        ("rule", "match"),
        [
            (Rule("c.weight", "c"), r"no axes for 'c' of shape \(2, 3, 4\).*infer_axes"),
            (Rule("c.weight", "c", axes=("in", "out")), "expected 'in', 'out' or 'batch' for each"),
            (Rule("c.weight", "c", axes=("batch", "in", "out")), "1 are 'batch'; expected 0"),
            (Rule("c.weight", "c", kind="conv", axes=("in", "out", "out")), "not a 'conv'"),
            (Rule("c.weight", "c", kind="conv", axes=("in", "out", "in")), "not a 'conv'"),
        ],
    )
    def test_whose_axes_do_not_fit(self, tmp_path, rule, match):
        folder = write_adapter(
            tmp_path / "x", {"c.lora_A.weight": numbers(2, 3), "c.lora_B.weight": numbers(4, 2)}
        )
        refused(folder, match, {"c": jnp.ones((2, 3, 4))}, [rule])

    @pytest.mark.wrong_types
    def test_whose_axes_are_none(self, tmp_path):
        folder = write_adapter(
            tmp_path / "x", {"c.lora_A.weight": numbers(2, 3), "c.lora_B.weight": numbers(4, 2)}
        )
        rule = Rule("c.weight", "c", axes=("in", "up", "out"))
        message = "expected 'in', 'out' or 'batch'"
        refused(folder, message, {"c": jnp.ones((2, 3, 4))}, [rule])


class TestPreview:
    def test_what_is_left_over(self, tmp_path):
        folder = write_adapter(tmp_path / "x", {**TENSORS, "b.k.weight": numbers(2)})
        tree = {**params(), "scale": jnp.ones(3)}
        found = preview(tree, names=[*NAMES, Rule("c.weight", "c")], path=folder)
        assert [row[0] for row in found.rows] == ["a.q.weight"]
        assert "b.k.weight" in found.problems[0]
        assert found.without_rule == ("scale",)
        assert [rule.name for rule in found.idle_rules] == ["c.weight"]
        text = str(found)
        for part in (
            "a/q/kernel",
            "lora_A (2, 3), lora_B (4, 2)",
            "What does not fit:\n- '",
            "Leaves without a rule:\n- scale",
            "Rules without a leaf:\n- c.weight -> c",
        ):
            assert part in text

    def test_a_stack(self, tmp_path):
        model = MODELS["stacked"]
        adapted = lora_jax.wrap(
            model.params(), "query/kernel", rank=2, axes=model.axes, train="classifier"
        )
        save(tmp_path / "adapter", adapted, names=model.names)
        for tree in (model.params(), adapted):
            found = preview(tree, names=model.names, path=tmp_path / "adapter")
            assert found.problems == ()
            assert [row[-1] for row in found.rows] == [
                "3 × lora_A (2, 8), lora_B (8, 2)",
                "in full (3,)",
                "in full (3, 8)",
            ]
        assert len(preview(adapted, names=model.names).rows) == len(model.names)

    def test_axes_that_are_not_known(self):
        found = preview({"c": jnp.ones((2, 3, 4))}, names=[Rule("c.weight", "c")])
        assert found.rows == (("c.weight", "?", "c", "(2, 3, 4)", "?", ""),)
        assert "no axes for 'c'" in found.problems[0]


def test_bert_in_the_layout_of_hugging_face(tmp_path):
    """Rules for what is called otherwise come first, and one for all the rest follows."""
    tree = {
        "encoder": {
            f"layer_{n}": {
                "attention": {"query": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}},
                "output": {"dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}},
            }
            for n in range(2)
        }
    }
    names = [
        Rule(f"encoder.layer.{{n}}.{inner}.{theirs}", f"encoder/layer_{{n}}/{path}/{ours}")
        for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
        for inner, path in (
            ("attention.self.{name}", "attention/{name:query|key|value}"),
            ("{module}", "{module:.+}"),
        )
    ]
    adapted = lora_jax.wrap(tree, "kernel", rank=2, train="bias")
    save(tmp_path / "adapter", adapted, names=names)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.1.attention.self.query",
        "encoder.layer.0.output.dense",
        "encoder.layer.1.output.dense",
    ]
    assert config["bias"] == "lora_only"
    shutil.copytree(tmp_path / "adapter", tmp_path / "copy")
    loaded = load(tmp_path / "copy", tree, names=names)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapted)
