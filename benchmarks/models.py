"""Five models as plain functions of their parameters, each written once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.operations import Operations

Params = dict[str, Any]
Shape = tuple[int, ...]


def half_of_squares(y: Array) -> Array:
    """Returns half the sum of the squares."""
    return jnp.sum(jnp.square(y.astype(jnp.float32))) / 2


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, the shapes of what it takes, and where its adapters go.

    Nothing is computed with it, only compiled, so shapes are all that is needed.

    Attributes:
      name: what to call it.
      description: its sizes, in words.
      apply: `(operations, params, inputs) -> logits`.
      params: the shapes of the parameters.
      inputs: the shape and dtype of a batch.
      targets: which parameters are adapted.
      rank: the rank of the adapters.
      loss: what a step that has no labels minimises, of what `apply` returns.
    """

    name: str
    description: str
    apply: Callable[[Operations, Params, Array], Array]
    params: Params
    inputs: jax.ShapeDtypeStruct
    targets: str | tuple[str, ...]
    rank: int
    loss: Callable[[Array], Array] = half_of_squares


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of a float32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of an int32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


# --- MLP ---------------------------------------------------------------------------------------


def mlp(operations: Operations, params: Params, x: Array) -> Array:
    """Returns the logits of a network of three dense layers."""
    for layer in ("layer_0", "layer_1"):
        x = jax.nn.relu(operations.project(x, params[layer]["kernel"]) + params[layer]["bias"])
    return operations.project(x, params["head"]["kernel"]) + params["head"]["bias"]


def _dense(inputs: int, outputs: int) -> Params:
    return {"kernel": floats(inputs, outputs), "bias": floats(outputs)}


MLP = Model(
    name="mlp",
    description="784-1000-2000-10, batch 10, rank 1",
    apply=mlp,
    params={"layer_0": _dense(784, 1000), "layer_1": _dense(1000, 2000), "head": _dense(2000, 10)},
    inputs=floats(10, 784),
    targets="kernel",
    rank=1,
)


# --- transformers ------------------------------------------------------------------------------


def block(operations: Operations, params: Params, x: Array) -> Array:
    """Returns what a pre-norm transformer block gives for `x` (batch, tokens, embed)."""
    x = x + attention(operations, params["attention"], normalised(params["attention_norm"], x))
    return x + feed_forward(operations, params["mlp"], normalised(params["mlp_norm"], x))


def attention(operations: Operations, params: Params, x: Array) -> Array:
    """Returns causal self-attention, with kernels (embed, heads, head_dim) as in Flax."""
    query, key, value = (
        operations.project(x, params[name]["kernel"]) + params[name]["bias"]
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    tokens = x.shape[1]
    visible = jnp.tril(jnp.ones((tokens, tokens), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e9))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return operations.project(mixed, params["out"]["kernel"], axes=2) + params["out"]["bias"]


def feed_forward(operations: Operations, params: Params, x: Array) -> Array:
    """Returns the two dense layers of a block."""
    hidden = jax.nn.gelu(operations.project(x, params["up"]["kernel"]) + params["up"]["bias"])
    return operations.project(hidden, params["down"]["kernel"]) + params["down"]["bias"]


def normalised(params: Params, x: Array) -> Array:
    """Returns a layer norm of `x`."""
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
    return centred / deviation * params["scale"] + params["bias"]


def transformer_block(operations: Operations, params: Params, x: Array) -> Array:
    """Returns one block and a head."""
    hidden = block(operations, params["block"], x)
    return operations.project(hidden, params["head"]["kernel"])


def scanned_transformer(operations: Operations, params: Params, x: Array) -> Array:
    """Returns rematerialised blocks, stacked and scanned over, and a head."""

    def body(x: Array, layer: Params) -> tuple[Array, None]:
        return block(operations, layer, x), None

    # Within a scan nothing needs protection from being merged with the forward pass.
    x, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, params["blocks"])
    return operations.project(x, params["head"]["kernel"])


def language_model(operations: Operations, params: Params, tokens: Array) -> Array:
    """Returns the logits of a language model whose head is its embedding, transposed."""
    x = operations.look_up(params["embedding"], tokens)
    for layer in ("block_0", "block_1"):
        x = block(operations, params[layer], x)
    return operations.project_back(normalised(params["norm"], x), params["embedding"])


def block_params(embed: int, heads: int, layers: Shape = ()) -> Params:
    """Returns the shapes of a block's parameters, or of a stack of blocks."""
    head_dim = embed // heads

    def projection(*shape: int, bias: Shape) -> Params:
        return {"kernel": floats(*layers, *shape), "bias": floats(*layers, *bias)}

    norm = {"scale": floats(*layers, embed), "bias": floats(*layers, embed)}
    into_heads = projection(embed, heads, head_dim, bias=(heads, head_dim))
    return {
        "attention_norm": norm,
        "attention": {
            "query": into_heads,
            "key": into_heads,
            "value": into_heads,
            "out": projection(heads, head_dim, embed, bias=(embed,)),
        },
        "mlp_norm": norm,
        "mlp": {
            "up": projection(embed, 4 * embed, bias=(4 * embed,)),
            "down": projection(4 * embed, embed, bias=(embed,)),
        },
    }


TRANSFORMER_BLOCK = Model(
    name="transformer-block",
    description="embed 512, 8 heads, batch 4 of 128 tokens, rank 8",
    apply=transformer_block,
    params={"block": block_params(512, 8), "head": {"kernel": floats(512, 10)}},
    inputs=floats(4, 128, 512),
    targets="block",
    rank=8,
)

SCANNED_TRANSFORMER = Model(
    name="scanned-transformer",
    description="6 rematerialised blocks in a scan, embed 512, 8 heads, batch 4 of 128 tokens, "
    "rank 8",
    apply=scanned_transformer,
    params={"blocks": block_params(512, 8, layers=(6,)), "head": {"kernel": floats(512, 10)}},
    inputs=floats(4, 128, 512),
    targets="blocks",
    rank=8,
)

LANGUAGE_MODEL = Model(
    name="tied-language-model",
    description="vocabulary 8000, 2 blocks, embed 512, 8 heads, batch 4 of 128 tokens, rank 8",
    apply=language_model,
    params={
        "embedding": floats(8000, 512),
        "block_0": block_params(512, 8),
        "block_1": block_params(512, 8),
        "norm": {"scale": floats(512), "bias": floats(512)},
    },
    inputs=integers(4, 128),
    targets=("embedding", "block_.*"),
    rank=8,
)


# --- CNN ---------------------------------------------------------------------------------------


def cnn(operations: Operations, params: Params, images: Array) -> Array:
    """Returns the logits of three convolutions with pooling, and two dense layers."""
    x = images
    for layer in ("conv_0", "conv_1", "conv_2"):
        x = jax.nn.relu(operations.convolve(x, params[layer]["kernel"]) + params[layer]["bias"])
        x = halved(x)
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(operations.project(x, params["dense"]["kernel"]) + params["dense"]["bias"])
    return operations.project(x, params["head"]["kernel"]) + params["head"]["bias"]


def halved(x: Array) -> Array:
    """Returns the means of 2 × 2 neighbouring places."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def _convolution(inputs: int, outputs: int) -> Params:
    return {"kernel": floats(3, 3, inputs, outputs), "bias": floats(outputs)}


CNN = Model(
    name="cnn",
    description="convolutions 3-64-128-256 on 32 × 32, dense 4096-256-10, batch 32, rank 4",
    apply=cnn,
    params={
        "conv_0": _convolution(3, 64),
        "conv_1": _convolution(64, 128),
        "conv_2": _convolution(128, 256),
        "dense": _dense(4 * 4 * 256, 256),
        "head": _dense(256, 10),
    },
    inputs=floats(32, 32, 32, 3),
    targets=("conv_.*", "dense"),
    rank=4,
)

MODELS = {
    model.name: model
    for model in (MLP, TRANSFORMER_BLOCK, SCANNED_TRANSFORMER, CNN, LANGUAGE_MODEL)
}
