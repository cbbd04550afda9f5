"""Files that can't be read: each error names what is wrong with the file or its config."""

import numpy as np
import pytest

from lora_jax import CheckpointError
from lora_jax.exchange.peft import load, read_config, save
from tests.exchange.peft.files import (
    KERNEL_A,
    NAMES,
    TENSORS,
    numbers,
    params,
    refused,
    wrapped,
    write_adapter,
)


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
