"""Rotary positions: heads that are rotated by angles that grow with their places."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.models.attention import Heads, Tokens
from experiments.models.llama.config import LlamaConfig


def rotary_angles(config: LlamaConfig, positions: Tokens) -> Float[Array, "batch length half"]:
    r"""Returns $p\,\theta^{-2i/d}$ for each position p and pair i, in radians.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
    """
    half = config.head_dim // 2
    rates = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return positions[..., None].astype(jnp.float32) * _scaled(config, rates)


def _scaled(config: LlamaConfig, rates: Float[Array, " half"]) -> Float[Array, " half"]:
    """Returns rates as Llama 3 has them: slow ones divided by a factor, fast ones as they are."""
    scaling = config.rope_scaling
    if config.rope_divisors is not None:
        return rates / jnp.asarray(config.rope_divisors, rates.dtype)
    if scaling is None:
        return rates
    turns = scaling.original_max_position_embeddings * rates / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    is_fast = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - is_fast) * rates / scaling.factor + is_fast * rates


def rotated(x: Heads, angles: Float[Array, "batch length half"]) -> Heads:
    """Returns heads, the two halves of each rotated by the angles, computed in float32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
