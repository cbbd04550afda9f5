"""A Llama-3-shaped model: its sizes, its parameters as shapes, its partition, and its loss.

The layers are scanned over and rematerialised. Attention holds the scores of one block of queries
at a time, and the loss the logits of one block of tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a model.

    Source: Grattafiori et al., The Llama 3 Herd of Models, 2024, table 3.
    """

    layers: int
    embed: int
    hidden: int
    heads: int
    kv_heads: int = 8
    vocabulary: int = 128_256

    @property
    def head_dim(self) -> int:
        """The size of one head of attention."""
        return self.embed // self.heads


SIZES = {
    "8b": Sizes(layers=32, embed=4_096, hidden=14_336, heads=32),
    "70b": Sizes(layers=80, embed=8_192, hidden=28_672, heads=64),
    "405b": Sizes(layers=126, embed=16_384, hidden=53_248, heads=128),
}
TARGETS = "attention|mlp"

# The axes of the mesh: examples are cut along the first two, weights along the last two.
DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)
RULES = {
    "embedding": P(TENSOR, FSDP),
    "attention/(query|key|value)": P(None, FSDP, TENSOR),
    "attention/out": P(None, TENSOR, FSDP),
    "mlp/(gate|up)": P(None, FSDP, TENSOR),
    "mlp/down": P(None, TENSOR, FSDP),
    "head": P(FSDP, TENSOR),
}

# Queries whose scores, and tokens whose logits, are held at a time.
_QUERIES, _TOKENS = 512, 512


def shapes(sizes: Sizes, dtype: Any) -> Params:
    """Returns the shapes of the parameters; those of the layers have an axis of layers in front."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    layers, embed, kv = sizes.layers, sizes.embed, sizes.kv_heads * sizes.head_dim
    return {
        "embedding": array(sizes.vocabulary, embed),
        "layers": {
            "attention": {
                "query": array(layers, embed, embed),
                "key": array(layers, embed, kv),
                "value": array(layers, embed, kv),
                "out": array(layers, embed, embed),
            },
            "mlp": {
                "gate": array(layers, embed, sizes.hidden),
                "up": array(layers, embed, sizes.hidden),
                "down": array(layers, sizes.hidden, embed),
            },
            "attention_norm": array(layers, embed),
            "mlp_norm": array(layers, embed),
        },
        "norm": array(embed),
        "head": array(embed, sizes.vocabulary),
    }


def parameter_count(sizes: Sizes) -> int:
    """Returns how many parameters a model has."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(sizes, jnp.bfloat16)))


def loss(sizes: Sizes, params: Params, tokens: Array) -> Array:
    """Returns the mean cross entropy of each token after those before it.

    Args:
      sizes: the sizes of the model.
      params: its parameters.
      tokens: of shape (batch, length + 1).
    """
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    x = _cut(params["embedding"][inputs])

    @jax.checkpoint
    def layer(x: Array, layer_params: Params) -> tuple[Array, None]:
        x = x + _attention(
            sizes, layer_params["attention"], _rms(layer_params["attention_norm"], x)
        )
        x = x + _mlp(layer_params["mlp"], _rms(layer_params["mlp_norm"], _cut(x)))
        return _cut(x), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return _cross_entropy(params["head"], _rms(params["norm"], x), following)


def _cut(x: Array) -> Array:
    """Returns activations (batch, length, embed) cut along examples and tokens."""
    return jax.lax.with_sharding_constraint(x, P(BATCH, TENSOR, None))


def _rms(scale: Array, x: Array) -> Array:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-5)).astype(x.dtype) * scale


def _mlp(params: Params, x: Array) -> Array:
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def _attention(sizes: Sizes, params: Params, x: Array) -> Array:
    """Returns causal attention in which several heads of queries share one of keys and values."""
    batch, length, _ = x.shape
    groups = sizes.heads // sizes.kv_heads
    query = _rotated((x @ params["query"]).reshape(batch, length, sizes.heads, -1))
    key = _rotated((x @ params["key"]).reshape(batch, length, sizes.kv_heads, -1))
    value = (x @ params["value"]).reshape(batch, length, sizes.kv_heads, -1)
    query = query.reshape(batch, length, sizes.kv_heads, groups, -1)
    block = min(_QUERIES, length)
    blocks = jnp.moveaxis(query.reshape(batch, length // block, block, *query.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_block(start: Array, queries: Array) -> Array:
        scores = jnp.einsum("bqkgd,btkd->bkgqt", queries, key, preferred_element_type=jnp.float32)
        seen = jnp.arange(length)[None, :] <= start + jnp.arange(block)[:, None]
        scores = jnp.where(seen, scores * sizes.head_dim**-0.5, -1e30)
        weights = jax.nn.softmax(scores).astype(value.dtype)
        return jnp.einsum("bkgqt,btkd->bqkgd", weights, value)

    starts = jnp.arange(0, length, block)
    mixed = jax.lax.map(lambda each: of_block(*each), (starts, blocks))
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, length, -1) @ params["out"]


def _rotated(x: Array) -> Array:
    """Returns heads (batch, length, heads, dim) with rotary position embeddings."""
    length, half = x.shape[1], x.shape[-1] // 2
    rates = 500_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * rates
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _cross_entropy(head: Array, x: Array, following: Array) -> Array:
    """Returns the mean over all tokens, the logits of one block at a time."""
    batch, length, embed = x.shape
    block = min(_TOKENS, length)
    rows = jnp.moveaxis(x.reshape(batch, length // block, block, embed), 1, 0)
    labels = jnp.moveaxis(following.reshape(batch, length // block, block), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_block(total: Array, each: tuple[Array, Array]) -> tuple[Array, None]:
        rows, labels = each
        logits = jnp.matmul(rows, head, preferred_element_type=jnp.float32)
        logits = jax.lax.with_sharding_constraint(logits, P(BATCH, None, TENSOR))
        chosen = jnp.sum(jnp.where(labels[..., None] == jnp.arange(head.shape[1]), logits, 0), -1)
        return total + jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen), None

    total, _ = jax.lax.scan(of_block, jnp.zeros((), jnp.float32), (rows, labels))
    return total / (batch * length)
