"""The parts of a U-Net: ResNet blocks, transformer blocks, and changes of resolution.

Modules have diffusers' names; `resnets_0/conv1` is what it calls `resnets.0.conv1`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

Image = Float[Array, "batch height width channels"]
Sequence = Float[Array, "batch length channels"]
Text = Float[Array, "batch tokens text"]
Time = Float[Array, "batch time"]


class ResnetBlock(nn.Module):
    """Two convolutions, between which the time is added, and the input beside them."""

    channels: int
    groups: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Image, time: Time) -> Image:
        def normalised(name: str, x: Image) -> Image:
            norm = nn.GroupNorm(self.groups, epsilon=self.epsilon, dtype=self.dtype, name=name)
            return nn.silu(norm(x))

        hidden = self._conv("conv1", 3)(normalised("norm1", x))
        embedded = nn.Dense(self.channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))
        hidden = hidden + embedded[:, None, None, :]
        hidden = self._conv("conv2", 3)(normalised("norm2", hidden))
        if x.shape[-1] != self.channels:
            x = self._conv("conv_shortcut", 1)(x)
        return x + hidden

    def _conv(self, name: str, size: int) -> nn.Conv:
        return nn.Conv(self.channels, (size, size), padding=size // 2, dtype=self.dtype, name=name)


class Attention(nn.Module):
    """Attention with several heads; to itself, or to a text."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Sequence, seen: Float[Array, "batch keys width"]) -> Sequence:
        channels = x.shape[-1]

        def in_heads(name: str, x: Array) -> Float[Array, "batch length heads dim"]:
            projected = nn.Dense(channels, use_bias=False, dtype=self.dtype, name=name)(x)
            return projected.reshape(*projected.shape[:-1], self.heads, -1)

        query, key, value = in_heads("to_q", x), in_heads("to_k", seen), in_heads("to_v", seen)
        mixed = jax.nn.dot_product_attention(query, key, value)
        return nn.Dense(channels, dtype=self.dtype, name="to_out_0")(mixed.reshape(x.shape))


class FeedForward(nn.Module):
    """A feed-forward layer with a gate: net_2(h · gelu(g)), where (h, g) = proj(x)."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Sequence) -> Sequence:
        channels = x.shape[-1]
        both = GatedProjection(8 * channels, self.dtype, name="net_0")(x)
        hidden, gate = jnp.split(both, 2, axis=-1)
        gated = hidden * nn.gelu(gate, approximate=False)
        return nn.Dense(channels, dtype=self.dtype, name="net_2")(gated)


class GatedProjection(nn.Module):
    """The first layer of the feed-forward layers, a module of its own in diffusers."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Sequence) -> Sequence:
        return nn.Dense(self.features, dtype=self.dtype, name="proj")(x)


class TransformerBlock(nn.Module):
    """Attention of pixels to each other, to the text, and feed-forward layers."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Sequence, text: Text) -> Sequence:
        def normalised(name: str, x: Sequence) -> Sequence:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)(x)

        own = normalised("norm1", x)
        x = x + Attention(self.heads, self.dtype, name="attn1")(own, own)
        x = x + Attention(self.heads, self.dtype, name="attn2")(normalised("norm2", x), text)
        return x + FeedForward(self.dtype, name="ff")(normalised("norm3", x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of an image, between two projections."""

    layers: int
    heads: int
    groups: int
    is_linear: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Image, text: Text) -> Image:
        hidden = nn.GroupNorm(self.groups, epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        hidden = self._projection("proj_in", x.shape[-1])(hidden)
        pixels = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
        for number in range(self.layers):
            block = TransformerBlock(self.heads, self.dtype, name=f"transformer_blocks_{number}")
            pixels = block(pixels, text)
        return x + self._projection("proj_out", x.shape[-1])(pixels.reshape(x.shape))

    def _projection(self, name: str, channels: int) -> nn.Module:
        if self.is_linear:
            return nn.Dense(channels, dtype=self.dtype, name=name)
        return nn.Conv(channels, (1, 1), dtype=self.dtype, name=name)


class Downsample(nn.Module):
    """Half the height and width."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Image) -> Image:
        conv = nn.Conv(
            x.shape[-1], (3, 3), strides=(2, 2), padding=1, dtype=self.dtype, name="conv"
        )
        return conv(x)


class Upsample(nn.Module):
    """Twice the height and width."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Image) -> Image:
        larger = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return nn.Conv(x.shape[-1], (3, 3), padding=1, dtype=self.dtype, name="conv")(larger)
