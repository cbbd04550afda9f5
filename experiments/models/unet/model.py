"""The U-Net of Stable Diffusion (Rombach et al., 2022) as plain Flax modules.

It is diffusers' `UNet2DConditionModel`: images have their channels last.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from experiments.models.unet.config import UNetConfig
from experiments.models.unet.layers import (
    Downsample,
    Image,
    ResnetBlock,
    SpatialTransformer,
    Text,
    Time,
    Upsample,
)

# What the embedding of time is wider than the first block.
_TIME_FACTOR = 4
_LONGEST_PERIOD = 10_000


class UNet(nn.Module):
    """Noisy images, their times and texts in, the noise that is in them out.

    Attributes:
      config: the settings.
      dtype: the dtype of its products and activations; parameters are cast to it.
    """

    config: UNetConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Image, times: Int[Array, " batch"], text: Text) -> Image:
        """Returns the noise, or what the model was trained to predict.

        Args:
          images: the images, whose sides are multiples of 2 to the number of halvings.
          times: the step of the noise schedule that each is at.
          text: the encoded text of each.
        """
        config = self.config
        first, *_ = channels = config.block_out_channels
        halvings = 2 ** (config.levels - 1)
        if any(side % halvings for side in images.shape[1:3]):
            raise ValueError(
                f"`images` has the shape {images.shape}; expected sides that are multiples of "
                f"{halvings}, which the {config.levels} resolutions halve."
            )
        images, text = images.astype(self.dtype), text.astype(self.dtype)
        time = TimeEmbedding(_TIME_FACTOR * first, self.dtype, name="time_embedding")(
            time_angles(times, first, config)
        )
        hidden = self._conv("conv_in", first)(images)
        skipped = [hidden]
        for level, width in enumerate(channels):
            down = DownBlock(config, level, self.dtype, name=f"down_blocks_{level}")
            hidden, outputs = down(hidden, time, text, width)
            skipped += outputs
        hidden = MiddleBlock(config, self.dtype, name="mid_block")(hidden, time, text)
        for number, width in enumerate(reversed(channels)):
            up = UpBlock(config, number, self.dtype, name=f"up_blocks_{number}")
            hidden = up(hidden, skipped, time, text, width)
        norm = nn.GroupNorm(
            config.norm_num_groups, epsilon=config.norm_eps, dtype=self.dtype, name="conv_norm_out"
        )
        return self._conv("conv_out", config.out_channels)(nn.silu(norm(hidden)))

    def _conv(self, name: str, features: int) -> nn.Conv:
        return nn.Conv(features, (3, 3), padding=1, dtype=self.dtype, name=name)


def time_angles(
    times: Int[Array, " batch"], width: int, config: UNetConfig
) -> Float[Array, "batch width"]:
    """Returns sines and cosines of each time at many frequencies (Vaswani et al., 2017)."""
    half = width // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - config.freq_shift)
    rates = jnp.exp(-jnp.log(float(_LONGEST_PERIOD)) * exponents)
    angles = times.astype(jnp.float32)[:, None] * rates[None, :]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts[::-1] if config.flip_sin_to_cos else parts, axis=-1)


class TimeEmbedding(nn.Module):
    """Two layers on the sines and cosines of a time."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, angles: Float[Array, "batch width"]) -> Time:
        hidden = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(angles)
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(nn.silu(hidden))


class _Block(nn.Module):
    """What the blocks of all resolutions are made of."""

    config: UNetConfig

    def _resnet(self, number: int, channels: int, dtype: Any) -> ResnetBlock:
        config = self.config
        return ResnetBlock(
            channels, config.norm_num_groups, config.norm_eps, dtype, name=f"resnets_{number}"
        )

    def _attention(self, number: int, heads: int, dtype: Any) -> SpatialTransformer:
        config = self.config
        return SpatialTransformer(
            config.transformer_layers_per_block,
            heads,
            config.norm_num_groups,
            config.use_linear_projection,
            dtype,
            name=f"attentions_{number}",
        )


class DownBlock(_Block):
    """A resolution on the way down, and the step to the next one."""

    level: int
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: Image, time: Time, text: Text, width: int
    ) -> tuple[Image, list[Image]]:
        config, level = self.config, self.level
        outputs = []
        for number in range(config.layers_per_block):
            hidden = self._resnet(number, width, self.dtype)(hidden, time)
            if config.has_attention_down[level]:
                heads = config.attention_head_dim[level]
                hidden = self._attention(number, heads, self.dtype)(hidden, text)
            outputs.append(hidden)
        if level < config.levels - 1:
            hidden = Downsample(self.dtype, name="downsamplers_0")(hidden)
            outputs.append(hidden)
        return hidden, outputs


class MiddleBlock(_Block):
    """The coarsest resolution, between the ways down and up."""

    dtype: Any

    @nn.compact
    def __call__(self, hidden: Image, time: Time, text: Text) -> Image:
        width, heads = hidden.shape[-1], self.config.attention_head_dim[-1]
        hidden = self._resnet(0, width, self.dtype)(hidden, time)
        hidden = self._attention(0, heads, self.dtype)(hidden, text)
        return self._resnet(1, width, self.dtype)(hidden, time)


class UpBlock(_Block):
    """A resolution on the way up, which also sees what was there on the way down."""

    number: int
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: Image, skipped: list[Image], time: Time, text: Text, width: int
    ) -> Image:
        config, number = self.config, self.number
        for layer in range(config.layers_per_block + 1):
            hidden = jnp.concatenate([hidden, skipped.pop()], axis=-1)
            hidden = self._resnet(layer, width, self.dtype)(hidden, time)
            if config.has_attention_up[number]:
                heads = config.attention_head_dim[-1 - number]
                hidden = self._attention(layer, heads, self.dtype)(hidden, text)
        if number < config.levels - 1:
            hidden = Upsample(self.dtype, name="upsamplers_0")(hidden)
        return hidden
