"""A Llama-3-shaped model: its parameters as shapes, its partition, and its loss.

The layers are scanned over and rematerialised. The loss holds the logits of one block of tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from benchmarks.llama_layers import Params, Sizes, attention, layer_shapes, mlp, rms
from benchmarks.operations import PLAIN

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

# Tokens whose logits are held at a time.
_TOKENS = 512


def shapes(sizes: Sizes, dtype: Any) -> Params:
    """Returns the shapes of the parameters; those of the layers have an axis of layers in front."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    embed = sizes.embed
    return {
        "embedding": array(sizes.vocabulary, embed),
        "layers": layer_shapes(sizes, dtype),
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
        normed = rms(layer_params["attention_norm"], x)
        x = x + attention(sizes, PLAIN, layer_params["attention"], normed)
        x = x + mlp(PLAIN, layer_params["mlp"], rms(layer_params["mlp_norm"], _cut(x)))
        return _cut(x), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return _cross_entropy(params["head"], rms(params["norm"], x), following)


def _cut(x: Array) -> Array:
    """Returns activations (batch, length, embed) cut along examples and tokens."""
    return jax.lax.with_sharding_constraint(x, P(BATCH, TENSOR, None))


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
