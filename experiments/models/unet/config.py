"""The settings of a U-Net of a text-to-image model, as diffusers' `config.json` holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from experiments.common.errors import InputError
from experiments.models.entries import check_supported, read_entries

_DOWN_WITH_ATTENTION = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP_WITH_ATTENTION = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}

# Entries that ask for what this model does not compute, with the only value that it supports.
_SUPPORTED: Mapping[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


@dataclass(frozen=True)
class UNetConfig:
    """The settings of one U-Net; names and defaults are diffusers'.

    Attributes:
      sample_size: height and width of what it denoises.
      in_channels: its channels.
      out_channels: the channels of the noise that it predicts.
      block_out_channels: the channels of each resolution, the finest first.
      down_block_types: which resolutions have attention, on the way down.
      up_block_types: the same on the way up, the coarsest first.
      layers_per_block: ResNet blocks of a resolution on the way down; there is one more on the way
        up.
      transformer_layers_per_block: transformer blocks behind each ResNet block that has attention.
      attention_head_dim: the number of heads of each resolution; what diffusers calls it is a
        mistake of long ago, which files keep.
      cross_attention_dim: the width of the text.
      norm_num_groups: groups of channels that are normalised together.
      norm_eps: what is added to variances.
      use_linear_projection: whether attention's input and output layers are linear layers, and not
        convolutions of one pixel.
      flip_sin_to_cos: whether cosines come first in the embedding of time.
      freq_shift: how the frequencies of that embedding are spread.
    """

    sample_size: int = 32
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    layers_per_block: int = 2
    transformer_layers_per_block: int = 1
    attention_head_dim: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 1_280
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0

    def __post_init__(self) -> None:
        """Raises an `InputError` unless the settings fit each other."""
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types", "attention_head_dim"):
            if len(getattr(self, name)) != levels:
                raise InputError(
                    f"`{name}` is {getattr(self, name)}; expected {levels} entries, as "
                    "`block_out_channels` has"
                )
        _check_known("down_block_types", self.down_block_types, _DOWN_WITH_ATTENTION)
        _check_known("up_block_types", self.up_block_types, _UP_WITH_ATTENTION)
        self._check_channels()

    def _check_channels(self) -> None:
        heads = zip(self.block_out_channels, self.attention_head_dim, strict=True)
        if any(channels % count for channels, count in heads):
            raise InputError(
                f"`block_out_channels` is {self.block_out_channels}; expected multiples of the "
                f"heads in `attention_head_dim`, {self.attention_head_dim}"
            )
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise InputError(
                f"`block_out_channels` is {self.block_out_channels}; expected multiples of "
                f"`norm_num_groups`, {self.norm_num_groups}"
            )

    @property
    def levels(self) -> int:
        """How many resolutions there are."""
        return len(self.block_out_channels)

    @property
    def has_attention_down(self) -> tuple[bool, ...]:
        """Which resolutions have attention on the way down."""
        return tuple(_DOWN_WITH_ATTENTION[name] for name in self.down_block_types)

    @property
    def has_attention_up(self) -> tuple[bool, ...]:
        """Which have it on the way up, the coarsest first."""
        return tuple(_UP_WITH_ATTENTION[name] for name in self.up_block_types)

    def entries(self) -> dict[str, Any]:
        """Returns what a `config.json` holds, from which `config_of` makes the settings."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            "_class_name": "UNet2DConditionModel",
            **{
                name: list(value) if isinstance(value, tuple) else value
                for name, value in own.items()
            },
        }


def read_config(path: Path) -> UNetConfig:
    """Returns the settings in a `config.json`.

    Raises:
      InputError: it can't be read, or asks for what this model does not compute.
    """
    entries = read_entries(path)
    if entries.get("_class_name") != "UNet2DConditionModel":
        raise InputError(f"{path} is not the config.json of a UNet2DConditionModel")
    return config_of(entries, str(path))


def config_of(entries: Mapping[str, Any], subject: str) -> UNetConfig:
    """Returns the settings in these entries.

    Raises:
      InputError: an entry asks for what this model does not compute; it is named.
    """
    check_supported(entries, _SUPPORTED, subject)
    chosen = {
        field.name: entries[field.name] for field in fields(UNetConfig) if field.name in entries
    }
    levels = len(chosen.get("block_out_channels", UNetConfig.block_out_channels))
    for name in ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim"):
        if name in chosen:
            chosen[name] = _one_number(name, chosen[name], subject)
    heads = chosen.get("attention_head_dim", 8)
    chosen["attention_head_dim"] = (heads,) * levels if isinstance(heads, int) else heads
    lists = {
        name: tuple(value) for name, value in chosen.items() if isinstance(value, list | tuple)
    }
    return UNetConfig(**{**chosen, **lists})


def _one_number(name: str, value: Any, subject: str) -> int:
    """Returns the number that a list repeats, or the number itself."""
    numbers = (
        {value} if isinstance(value, int) else set(value) if isinstance(value, list) else set()
    )
    if len(numbers) != 1 or not isinstance(number := numbers.pop(), int):
        raise InputError(
            f"{subject} has `{name}` {value!r}; this model computes one number for all resolutions"
        )
    return number


def _check_known(name: str, types: Sequence[str], known: Mapping[str, bool]) -> None:
    unknown = [kind for kind in types if kind not in known]
    if unknown:
        raise InputError(f"`{name}` has {unknown[0]!r}; expected one of {', '.join(known)}")
