"""Blocks as Llama's, with weights that are used through `Operations`, scanned over."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.operations import Operations

Params = dict[str, Any]
TARGETS = "query|key|value|out|gate|up|down"
# Queries whose scores are held at a time.
_QUERIES = 512


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the blocks.

    Attributes:
      layers: how many there are.
      embed: the width between blocks.
      hidden: the width of the feed-forward layers.
      heads: heads of queries.
      kv_heads: heads of keys and values.
      examples: examples in a batch.
      length: tokens of an example.
      dtype: the dtype of weights and activations.
      remat: whether the backward pass computes each block again.
    """

    layers: int
    embed: int
    hidden: int
    heads: int
    kv_heads: int
    examples: int
    length: int
    dtype: Any
    remat: bool

    @property
    def head_dim(self) -> int:
        """The size of one head of attention."""
        return self.embed // self.heads


# SmolLM2-135M's blocks, for a CPU, and Llama-3-8B's, for accelerators.
SMALL = Sizes(4, 576, 1_536, 9, 3, examples=8, length=512, dtype=jnp.float32, remat=False)
LARGE = Sizes(2, 4_096, 14_336, 32, 8, examples=2, length=4_096, dtype=jnp.bfloat16, remat=True)


def shapes(sizes: Sizes) -> Params:
    """Returns the shapes of the parameters, with an axis of layers in front."""

    def stack(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sizes.layers, *shape), sizes.dtype)

    kv = sizes.kv_heads * sizes.head_dim
    return {
        "attention_norm": stack(sizes.embed),
        "query": stack(sizes.embed, sizes.embed),
        "key": stack(sizes.embed, kv),
        "value": stack(sizes.embed, kv),
        "out": stack(sizes.embed, sizes.embed),
        "mlp_norm": stack(sizes.embed),
        "gate": stack(sizes.embed, sizes.hidden),
        "up": stack(sizes.embed, sizes.hidden),
        "down": stack(sizes.hidden, sizes.embed),
    }


def loss(sizes: Sizes, operations: Operations, params: Any, x: Array) -> Array:
    """Returns half the sum of the squares of what the blocks make of `x`.

    Args:
      sizes: the sizes of the blocks.
      operations: how they use their weights.
      params: the parameters.
      x: of shape (examples, length, embed).
    """

    def block(x: Array, layer: Any) -> tuple[Array, None]:
        x = x + _attention(sizes, operations, layer, _rms(layer["attention_norm"], x))
        return x + _mlp(operations, layer, _rms(layer["mlp_norm"], x)), None

    # Within a scan nothing needs protection from being merged with the forward pass.
    body = jax.checkpoint(block, prevent_cse=False) if sizes.remat else block
    x, _ = jax.lax.scan(body, x, params)
    return jnp.sum(jnp.square(x.astype(jnp.float32))) / 2


def _rms(scale: Array, x: Array) -> Array:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-5)).astype(x.dtype) * scale


def _mlp(operations: Operations, layer: Any, x: Array) -> Array:
    gate = jax.nn.silu(operations.project(x, layer["gate"]))
    return operations.project(gate * operations.project(x, layer["up"]), layer["down"])


def _attention(sizes: Sizes, operations: Operations, layer: Any, x: Array) -> Array:
    """Returns causal attention in which several heads of queries share one of keys and values."""
    query, key, value = (
        operations.project(x, layer[name]).reshape(*x.shape[:2], -1, sizes.head_dim)
        for name in ("query", "key", "value")
    )
    query, key = _rotated(query), _rotated(key)
    groups = sizes.heads // sizes.kv_heads
    block = min(_QUERIES, sizes.length)
    split = query.reshape(len(x), -1, block, sizes.kv_heads, groups, sizes.head_dim)

    @jax.checkpoint
    def of_block(start: Array, queries: Array) -> Array:
        scores = jnp.einsum("bqkgd,btkd->bkgqt", queries, key, preferred_element_type=jnp.float32)
        seen = jnp.arange(sizes.length) <= start + jnp.arange(block)[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores * sizes.head_dim**-0.5, -1e30))
        return jnp.einsum("bkgqt,btkd->bqkgd", weights.astype(value.dtype), value)

    starts = jnp.arange(0, sizes.length, block)
    mixed = jax.lax.map(lambda each: of_block(*each), (starts, jnp.moveaxis(split, 1, 0)))
    return operations.project(jnp.moveaxis(mixed, 0, 1).reshape(x.shape), layer["out"])


def _rotated(x: Array) -> Array:
    """Returns heads (examples, length, heads, dim) with rotary position embeddings."""
    length, half = x.shape[1], x.shape[-1] // 2
    rates = 500_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * rates
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
