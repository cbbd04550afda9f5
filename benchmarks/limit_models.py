"""What steps are compared on beside their limit: layers that are scanned over, and a study."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.limit_study import smollm2
from benchmarks.llama_layers import (
    LLAMA_8B,
    TARGETS,
    Params,
    Sizes,
    attention,
    layer_shapes,
    mlp,
    rms,
)
from benchmarks.models import Model, floats
from benchmarks.operations import Operations


def llama(sizes: Sizes, *, examples: int, length: int, dtype: Any, remat: bool) -> Model:
    """Returns layers of these sizes.

    Args:
      sizes: the sizes of the layers.
      examples: examples in a batch.
      length: tokens of an example.
      dtype: the dtype of weights and activations.
      remat: whether the backward pass computes each layer again.
    """

    def layer(operations: Operations, params: Params, x: Array) -> Array:
        normed = rms(params["attention_norm"], x)
        x = x + attention(sizes, operations, params["attention"], normed)
        return x + mlp(operations, params["mlp"], rms(params["mlp_norm"], x))

    def apply(operations: Operations, params: Params, x: Array) -> Array:
        def body(x: Array, params: Params) -> tuple[Array, None]:
            return layer(operations, params, x), None

        # Within a scan nothing needs protection from being merged with the forward pass.
        body = jax.checkpoint(body, prevent_cse=False) if remat else body
        return jax.lax.scan(body, x, params)[0]

    return Model(
        name="llama",
        description=f"{sizes.layers} layers, embed {sizes.embed}, hidden {sizes.hidden}, "
        f"{examples} × {length} tokens, {jnp.dtype(dtype).name}",
        apply=apply,
        params=layer_shapes(sizes, dtype),
        inputs=jax.ShapeDtypeStruct((examples, length, sizes.embed), dtype),
        targets=TARGETS,
        rank=8,
    )


def _feed_forward(operations: Operations, params: Params, x: Array) -> Array:
    def body(x: Array, layer: Params) -> tuple[Array, None]:
        hidden = jax.nn.gelu(operations.project(x, layer["up"]))
        return x + operations.project(hidden, layer["down"]), None

    return jax.lax.scan(body, x, params)[0]


FEED_FORWARD = Model(
    name="feed-forward",
    description="6 layers 576-1536-576, 4096 tokens as one axis, float32",
    apply=_feed_forward,
    params={"up": floats(6, 576, 1_536), "down": floats(6, 1_536, 576)},
    inputs=floats(4_096, 576),
    targets="up|down",
    rank=8,
)

# SmolLM2-135M's layers.
_SMALL = Sizes(layers=4, embed=576, hidden=1_536, heads=9, kv_heads=3)
SMALL = llama(_SMALL, examples=8, length=512, dtype=jnp.float32, remat=False)
LARGE = llama(
    dataclasses.replace(LLAMA_8B, layers=2),
    examples=2,
    length=4_096,
    dtype=jnp.bfloat16,
    remat=True,
)
# What is timed here, and what is compiled for a machine that is not.
TIMED: Mapping[str, Callable[[], Model]] = {
    "llama": lambda: SMALL,
    "feed-forward": lambda: FEED_FORWARD,
    "smollm2": smollm2,
}
