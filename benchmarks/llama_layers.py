"""Llama-3-shaped layers: their sizes, their parameters as shapes, attention and feed-forward.

Attention holds the scores of one block of queries at a time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.operations import Operations

Params = dict[str, Any]
TARGETS = "attention|mlp"
_QUERIES = 512


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of layers."""

    layers: int
    embed: int
    hidden: int
    heads: int
    kv_heads: int = 8

    @property
    def head_dim(self) -> int:
        """The size of one head of attention."""
        return self.embed // self.heads


# Source: Grattafiori et al., The Llama 3 Herd of Models, 2024, table 3.
LLAMA_8B = Sizes(layers=32, embed=4_096, hidden=14_336, heads=32)


def layer_shapes(sizes: Sizes, dtype: Any) -> Params:
    """Returns the shapes of the layers' parameters, with an axis of layers in front."""

    def stack(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sizes.layers, *shape), dtype)

    embed, kv = sizes.embed, sizes.kv_heads * sizes.head_dim
    return {
        "attention": {
            "query": stack(embed, embed),
            "key": stack(embed, kv),
            "value": stack(embed, kv),
            "out": stack(embed, embed),
        },
        "mlp": {
            "gate": stack(embed, sizes.hidden),
            "up": stack(embed, sizes.hidden),
            "down": stack(sizes.hidden, embed),
        },
        "attention_norm": stack(embed),
        "mlp_norm": stack(embed),
    }


def rms(scale: Array, x: Array) -> Array:
    """Returns `x` over the root mean square of its last axis, scaled."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-5)).astype(x.dtype) * scale


def mlp(operations: Operations, params: Params, x: Array) -> Array:
    """Returns the gated feed-forward layers of `x`."""
    gate = jax.nn.silu(operations.project(x, params["gate"]))
    return operations.project(gate * operations.project(x, params["up"]), params["down"])


def attention(sizes: Sizes, operations: Operations, params: Params, x: Array) -> Array:
    """Returns causal attention in which several heads of queries share one of keys and values."""
    batch, length, _ = x.shape
    query, key, value = (
        operations.project(x, params[name]).reshape(batch, length, -1, sizes.head_dim)
        for name in ("query", "key", "value")
    )
    query, key = _rotated(query), _rotated(key)
    block = min(_QUERIES, length)
    shape = (batch, length // block, block, sizes.kv_heads, -1, sizes.head_dim)
    blocks = jnp.moveaxis(query.reshape(shape), 1, 0)

    @jax.checkpoint
    def of_block(start: Array, queries: Array) -> Array:
        scores = jnp.einsum("bqkgd,btkd->bkgqt", queries, key, preferred_element_type=jnp.float32)
        seen = jnp.arange(length)[None, :] <= start + jnp.arange(block)[:, None]
        scores = jnp.where(seen, scores * sizes.head_dim**-0.5, -1e30)
        weights = jax.nn.softmax(scores).astype(value.dtype)
        return jnp.einsum("bkgqt,btkd->bqkgd", weights, value)

    starts = jnp.arange(0, length, block)
    mixed = jax.lax.map(lambda each: of_block(*each), (starts, blocks))
    return operations.project(jnp.moveaxis(mixed, 0, 1).reshape(batch, length, -1), params["out"])


def _rotated(x: Array) -> Array:
    """Returns heads (batch, length, heads, dim) with rotary position embeddings."""
    length, half = x.shape[1], x.shape[-1] // 2
    rates = 500_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * rates
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
