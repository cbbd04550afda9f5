"""What can't be read or written: each error names it, and nothing is changed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import CheckpointError, _folders
from lora_jax.exchange.peft import Rule, _save, load, preview, read_config, save
from tests.exchange.peft.models import MODELS
from tests.exchange.peft.test_format import numbers, write_adapter

NAMES = [
    Rule("{module}.weight", "{module:.+}/kernel"),
    Rule("{module}.bias", "{module:.+}/bias"),
]
KERNEL_A, KERNEL_B = "a.q.lora_A.weight", "a.q.lora_B.weight"
TENSORS = {KERNEL_A: numbers(2, 3), KERNEL_B: numbers(4, 2)}


def params():
    return {"a": {"q": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}}


def wrapped(**settings):
    return lora_jax.wrap(params(), "kernel", **{"rank": 2, **settings})


def contents(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter", TENSORS)


def refused(folder, match, tree=None, names=NAMES, **options):
    with pytest.raises(CheckpointError, match=match):
        load(folder, params() if tree is None else tree, names=names, **options)


class TestFiles:
    def test_a_missing_folder(self, tmp_path):
        refused(tmp_path / "none", "none does not exist; expected a folder with adapter_config")

    def test_a_folder_without_a_config(self, tmp_path):
        refused(tmp_path, "not a PEFT adapter: it has no adapter_config.json")

    def test_a_folder_of_adapters(self, adapter):
        refused(adapter.parent, "Its folders 'adapter' hold adapters: choose one")

    def test_a_file(self, adapter):
        refused(adapter / "adapter_config.json", "not a PEFT adapter")

    def test_an_interrupted_save(self, adapter):
        adapter.rename(adapter.with_name(".adapter.previous"))
        refused(adapter, r"interrupted.*\.adapter\.previous: rename it to adapter")

    def test_no_tensors(self, adapter):
        (adapter / "adapter_model.safetensors").unlink()
        refused(adapter, "holds no adapter_model.safetensors")

    def test_a_pickle_is_not_opened(self, adapter):
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        refused(adapter, r"adapter_model.bin, a pickle.*model\.save_pretrained")

    def test_a_pickle_beside_tensors_is_not_opened(self, adapter):
        (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        assert load(adapter, params(), names=NAMES)["a"]["q"]["kernel"].rank == 2

    @pytest.mark.parametrize("end", [0, 1, 7, 8, 50, 200, -20, -1])
    def test_truncated_tensors(self, adapter, end):
        file = adapter / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:end])
        refused(adapter, f"{file} is damaged, take another copy: SafetensorError")

    @pytest.mark.parametrize("place", [0, 4, 9, 30, 60])
    def test_corrupted_headers(self, adapter, place):
        file = adapter / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[place] ^= 0xFF
        file.write_bytes(content)
        refused(adapter, f"{file} is damaged, take another copy")

    @pytest.mark.parametrize("text", ["", "{", "nonsense", "\x00", '{"r": ' + "[" * 100000])
    def test_a_config_that_is_not_json(self, adapter, text):
        (adapter / "adapter_config.json").write_text(text)
        refused(adapter, "adapter_config.json is damaged, take another copy: ")

    @pytest.mark.parametrize("text", ["[]", "null", "3", '"LORA"'])
    def test_a_config_that_is_no_object(self, adapter, text):
        (adapter / "adapter_config.json").write_text(text)
        refused(adapter, "adapter_config.json is damaged.*expected an object")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("key", TENSORS)
    def test_values_that_are_not_finite(self, tmp_path, key, value):
        tensors = {name: tensor.copy() for name, tensor in TENSORS.items()}
        tensors[key][1, 1] = value
        folder = write_adapter(tmp_path / "adapter", tensors)
        refused(folder, f"1 of {tensors[key].size} values in '.*{key}' that are not finite")

    def test_tensors_of_whole_numbers(self, tmp_path):
        folder = write_adapter(tmp_path / "x", {**TENSORS, KERNEL_A: numbers(2, 3).astype(int)})
        refused(folder, f"'.*{KERNEL_A}' in int64; expected a floating-point")

    def test_float64_asks_for_x64(self, tmp_path):
        folder = write_adapter(tmp_path / "x", {**TENSORS, KERNEL_A: numbers(2, 3) * np.float64(1)})
        refused(folder, "in float64, which JAX would round; call jax.config.update.*jax_enable_x64")


class TestConfigs:
    @pytest.mark.parametrize("peft_type", ["LOHA", "ADALORA", "PREFIX_TUNING", None])
    def test_other_methods(self, tmp_path, peft_type):
        folder = write_adapter(tmp_path / "adapter", TENSORS, peft_type=peft_type)
        refused(folder, f"`peft_type` {peft_type!r}; lora_jax supports 'LORA'")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("alora_invocation_tokens", [1, 2]),
            ("arrow_config", {"top_k": 2}),
            ("kasa_config", {"beta": 1}),
            ("layer_replication", [[0, 2], [1, 3]]),
            ("lora_bias", True),
            ("megatron_config", {"x": 1}),
            ("monteclora_config", {"num_samples": 8}),
            ("trainable_token_indices", [0]),
            ("use_bdlora", {"x": 1}),
            ("use_qalora", True),
            ("velora_config", {"num_groups": 4}),
        ],
    )
    def test_what_is_not_supported(self, tmp_path, key, value):
        folder = write_adapter(tmp_path / "adapter", TENSORS, **{key: value})
        refused(folder, f"`{key}` .*does not support that")
        with pytest.raises(CheckpointError, match=f"`config` has `{key}`"):
            save(tmp_path / "other", wrapped(), names=NAMES, config={key: value})

    @pytest.mark.parametrize(
        "init", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq"]
    )
    def test_initialisations_that_change_the_base(self, tmp_path, init):
        folder = write_adapter(tmp_path / "adapter", TENSORS, init_lora_weights=init)
        refused(folder, f"'{init}'.*path_initial_model_for_weight_conversion")

    @pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
    def test_other_initialisations(self, tmp_path, init):
        folder = write_adapter(tmp_path / "adapter", TENSORS, init_lora_weights=init)
        assert load(folder, params(), names=NAMES)["a"]["q"]["kernel"].rank == 2

    @pytest.mark.parametrize(
        ("config", "match"),
        [
            ({"r": 0}, "the rank 0 for 'r'"),
            ({"r": "2"}, "the rank '2' for 'r'"),
            ({"r": True}, "the rank True for 'r'"),
            ({"rank_pattern": {"x": 1.5}}, "the rank 1.5 for 'x'"),
            ({"rank_pattern": [1]}, "`rank_pattern`"),
            ({"lora_alpha": "16"}, "the alpha '16' for 'lora_alpha'"),
            ({"lora_alpha": float("nan")}, "the alpha nan"),
            ({"lora_alpha": float("inf")}, "the alpha inf"),
            ({"alpha_pattern": {"x": None}}, "the alpha None for 'x'"),
            ({"target_parameters": "experts"}, "`target_parameters` 'experts'; expected a list"),
            ({"modules_to_save": [1]}, r"`modules_to_save` \[1\]; expected a list"),
            ({"alpha_pattern": {"(": 1}}, r"`alpha_pattern` has '\(', .* regular expression"),
        ],
    )
    def test_values_of_wrong_types(self, tmp_path, config, match):
        refused(write_adapter(tmp_path / "adapter", TENSORS, **config), match)

    def test_a_rank_that_the_tensors_do_not_have(self, tmp_path):
        folder = write_adapter(tmp_path / "adapter", TENSORS, rank_pattern={"q": 3})
        refused(folder, f"{KERNEL_A}' has the rank 2, and the config gives it 3")

    def test_no_code_of_a_config_runs(self, tmp_path):
        config = {
            "auto_mapping": {"base_model_class": "Anything", "parent_library": "antigravity"},
            "base_model_name_or_path": "../../../etc/passwd",
        }
        folder = write_adapter(tmp_path / "adapter", TENSORS, **config)
        assert load(folder, params(), names=NAMES)["a"]["q"]["kernel"].rank == 2
        assert read_config(folder)["auto_mapping"] == config["auto_mapping"]


class TestTensors:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"a.k.lora_A.weight": numbers(2, 3)}, "'.*a.k.lora_A.weight' of shape .* no place"),
            (
                {"a.k.weight": numbers(2, 3)},
                "no place.*'a.k.weight'.*nearest names are 'a.q.weight",
            ),
            ({"../../a.weight": numbers(2)}, "'.*/a.weight' of shape .* has no place"),
            ({KERNEL_B: None}, "'a.q.weight' has '.*lora_A.*expected 'lora_A', 'lora_B'"),
            ({"a.q.lora_magnitude_vector": numbers(4)}, "`use_dora` False"),
            (
                {"a.q.lora_B.bias": numbers(4)},
                "lora_B.bias' is not a tensor that lora_jax supports",
            ),
            ({"a.q.lora_diag": numbers(2)}, "lora_diag' is not a tensor that lora_jax supports"),
            ({KERNEL_A: numbers(2, 5)}, r"has shape \(2, 5\); expected \(2, 3\) at rank 2"),
            ({KERNEL_B: numbers(4, 3)}, r"has shape \(4, 3\); expected \(4, 2\) at rank 2"),
            ({KERNEL_A: np.float32(1)}, r"has shape \(\); expected \(0, 3\)"),
            ({KERNEL_A: numbers(2, 3, 1)}, r"has shape \(2, 3, 1\); expected \(2, 3\)"),
            ({"a.q.bias": numbers(5)}, r"a.q.bias' has shape \(5,\); expected \(4,\)"),
            ({"a.q.weight": numbers(4, 3)}, "'a/q/kernel' is adapted and trained in full"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path, change, match):
        tensors = {key: value for key, value in {**TENSORS, **change}.items() if value is not None}
        refused(write_adapter(tmp_path / "adapter", tensors), match)

    def test_all_problems_at_once(self, tmp_path):
        tensors = {f"b.{n}.weight": numbers(2) for n in range(7)}
        folder = write_adapter(tmp_path / "adapter", tensors)
        refused(folder, r"(?s)'b.0.weight'.*'b.4.weight'.*and 2 more")

    def test_no_tensors_at_all(self, tmp_path):
        refused(write_adapter(tmp_path / "adapter", {}), "holds no tensors")

    def test_a_missing_magnitude(self, tmp_path):
        folder = write_adapter(tmp_path / "adapter", TENSORS, use_dora=True)
        refused(folder, "expected 'lora_A', 'lora_B', 'magnitude'.*`use_dora` True")

    def test_an_embedding_that_is_none(self, tmp_path):
        tensors = {"e.lora_embedding_A": numbers(2, 5), "e.lora_embedding_B": numbers(3, 2)}
        folder = write_adapter(tmp_path / "adapter", tensors)
        names = [Rule("e.weight", "e")]
        refused(
            folder,
            r"adapts an Embedding.*Rule\('e.weight', 'e', kind='embedding'\)",
            {"e": jnp.ones((5, 3))},
            names,
        )

    def test_a_linear_that_is_an_embedding(self, adapter):
        names = [Rule("a.q.weight", "a/q/kernel", kind="embedding")]
        refused(adapter, r"adapts an? Linear.*kind='linear'\)", names=names)

    def test_an_array(self, adapter):
        names = [Rule("a.q.weight", "a/q/kernel", kind="array")]
        refused(adapter, "kind 'array'; expected an 'in' and an 'out' axis", names=names)

    def test_a_convolution_with_groups(self, tmp_path):
        """PEFT's adapter reads the channels of all groups."""
        tensors = {"c.lora_A.weight": numbers(2, 6, 3), "c.lora_B.weight": numbers(4, 1, 1)}
        folder = write_adapter(tmp_path / "adapter", tensors)
        rule = Rule("c.weight", "c", kind="conv", axes=("in", "in", "out"))
        refused(
            folder, "convolution with groups.*does not support", {"c": jnp.ones((3, 3, 4))}, [rule]
        )

    def test_two_values_of_one_weight(self, tmp_path):
        tensors = {**TENSORS, "a.q.base_layer.bias": numbers(4), "a.q.bias": numbers(4, start=1)}
        folder = write_adapter(tmp_path / "adapter", tensors)
        refused(folder, "'.*base_layer.bias' and '.*a.q.bias' are two values of 'a.q.bias'")

    @pytest.mark.parametrize(("value", "dtype"), [(1 / 3, jnp.bfloat16), (1e30, jnp.float16)])
    def test_a_weight_that_the_dtype_of_the_params_cannot_hold(self, tmp_path, value, dtype):
        folder = write_adapter(tmp_path / "x", {**TENSORS, "a.q.bias": numbers(4) + value})
        tree = params()
        tree["a"]["q"]["bias"] = jnp.ones(4, dtype)
        refused(folder, r"trained in full as float32.*has .*float16.*astype\('float32'\)", tree)

    def test_a_weight_that_the_dtype_of_the_params_can_hold(self, tmp_path):
        tensors = {**TENSORS, "a.q.bias": numbers(4).astype(np.float16)}
        loaded = load(write_adapter(tmp_path / "x", tensors), params(), names=NAMES)
        assert loaded["a"]["q"]["bias"].value.dtype == jnp.float32

    def test_wrapped_params(self, adapter):
        refused(adapter, r"wrapped already at 'a/q/kernel'.*unwrap\(params\)", wrapped())

    def test_params_are_left_alone(self, tmp_path):
        folder = write_adapter(tmp_path / "x", {**TENSORS, "a.q.bias": numbers(5)})
        tree = params()
        before = jax.tree.map(np.array, tree)
        refused(folder, "expected", tree)
        jax.tree.map(np.testing.assert_array_equal, tree, before)


class TestStacks:
    tree = {"q": jnp.ones((3, 3, 4))}  # noqa: RUF012
    names = (Rule("{n}.q.weight", "q"),)

    def stack(self, tmp_path, layers=(0, 1, 2), ranks=(2, 2, 2), **config):
        tensors = {}
        for layer in layers:
            tensors[f"{layer}.q.lora_A.weight"] = numbers(ranks[layer], 3)
            tensors[f"{layer}.q.lora_B.weight"] = numbers(4, ranks[layer])
        return write_adapter(tmp_path / "adapter", tensors, **config)

    def test_a_layer_too_many(self, tmp_path):
        refused(self.stack(tmp_path, (0, 3), (2,) * 4), "'3.q.weight'", self.tree, self.names)

    def test_ranks_that_differ(self, tmp_path):
        folder = self.stack(tmp_path, ranks=(2, 3, 2), rank_pattern={"1.q": 3})
        refused(
            folder,
            "a stack, which has one rank, and '0.q.weight' and '1.q.weight' differ in it: 2 and 3",
            self.tree,
            self.names,
        )

    def test_scales_that_differ(self, tmp_path):
        folder = self.stack(tmp_path, alpha_pattern={"2.q": 1})
        refused(folder, "one scale.*'2.q.weight' differ in it: 2.0 and 0.5", self.tree, self.names)

    def test_dtypes_that_differ(self, tmp_path):
        tensors = {
            f"{n}.q.lora_{x}.weight": numbers(4, 4)[:2].T.astype(d)
            if x == "B"
            else numbers(2, 3).astype(d)
            for n, d in enumerate([np.float32, np.float16])
            for x in "AB"
        }
        folder = write_adapter(tmp_path / "x", tensors)
        refused(folder, "one dtype", self.tree, self.names)

    def test_a_hole_in_a_stack_of_stacks(self, tmp_path):
        names = [Rule("{n}.{e}.weight", "q", axes=("batch", "batch", "in", "out"))]
        tensors = {f"0.{e}.lora_{x}.weight": numbers(2, 2) for e in (0, 2) for x in "AB"}
        folder = write_adapter(tmp_path / "adapter", tensors)
        refused(folder, "does not adapt '0.1.weight'", {"q": jnp.ones((2, 3, 2, 2))}, names)


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
        self.refused(tmp_path, "Of stacked adapters, save one at a time", tree)

    def test_magnitudes_in_some_places(self, tmp_path):
        tree = {"b": jnp.ones((3, 3)), "c": jnp.ones((3, 3))}
        adapted = lora_jax.wrap(tree, {"b": {"dora": True}, "c": {}}, rank=1)
        names = [Rule("{n}.weight", "{n}")]
        self.refused(tmp_path, r"DoRA\) in some places and none at 'c'", adapted, names)

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
        ("module", "step"), [(_save, "write_tensors"), (_folders, "_put_in_place")]
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

    def test_that_give_two_leaves_one_name(self):
        names = [Rule("x.weight", "a"), Rule("x.weight", "b")]
        with pytest.raises(ValueError, match="'a' and 'b' the same PyTorch name 'x.weight'"):
            preview({"a": jnp.ones(2), "b": jnp.ones(2)}, names=names)

    def test_that_stack_a_leaf_without_a_batch_axis(self):
        rule = Rule("{n}.weight", "a", axes=("in", "out"))
        with pytest.raises(ValueError, match="a batch axis for each field.*'n'"):
            preview({"a": jnp.ones((2, 2))}, names=[rule])

    @pytest.mark.parametrize(
        ("rule", "match"),
        [
            (Rule("c.weight", "c"), r"no axes for 'c' of shape \(2, 3, 4\).*infer_axes"),
            (Rule("c.weight", "c", axes=("in", "out")), "expected 'in', 'out' or 'batch' for each"),
            (Rule("c.weight", "c", axes=("batch", "in", "out")), "1 are 'batch'; expected 0"),
            (Rule("c.weight", "c", kind="conv", axes=("in", "out", "out")), "no 'conv'"),
            (Rule("c.weight", "c", kind="conv", axes=("in", "out", "in")), "no 'conv'"),
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
