"""The settings of a U-Net: what `config.json` may say, and what is refused by name."""

import json

import pytest

from experiments.common.errors import InputError
from experiments.models.unet import UNetConfig
from experiments.models.unet.config import config_of, read_config

SMALL = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "norm_num_groups": 8,
}


def test_numbers_and_lists_that_repeat_one():
    found = config_of(
        {**SMALL, "attention_head_dim": 4, "layers_per_block": [2, 2], "cross_attention_dim": 16},
        "it",
    )
    assert found.attention_head_dim == (4, 4)
    assert found.layers_per_block == 2
    assert found.has_attention_down == (True, False)
    assert found.has_attention_up == (False, True)


def test_entries_give_the_same_settings():
    found = config_of({**SMALL, "attention_head_dim": [2, 4]}, "it")
    assert config_of(found.entries(), "it") == found


REFUSED = {
    "class_embed_type": ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
    "an act_fn": ({"act_fn": "gelu"}, "computes with 'silu' alone"),
    "layers": ({"layers_per_block": [1, 2]}, "one number for all resolutions"),
    "a block": ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "'AttnDownBlock2D'"),
    "a level": ({"up_block_types": ["UpBlock2D"]}, "expected 2 entries"),
    "heads": ({"attention_head_dim": 5}, "multiples of the heads"),
    "groups": ({"attention_head_dim": 4, "norm_num_groups": 7}, "`norm_num_groups`, 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    entries, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        config_of({**SMALL, **entries}, "config.json")


def test_files_that_are_none(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match="can't be read"):
        read_config(path)
    path.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_config(path)
    path.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="is not the config.json of a UNet2DConditionModel"):
        read_config(path)


def test_defaults_are_those_of_stable_diffusion():
    assert UNetConfig().block_out_channels == (320, 640, 1280, 1280)
