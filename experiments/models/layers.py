"""Layers that several models have, and stacks of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from experiments.models.recomputing import computed_again

Tokens = Int[Array, "batch length"]
Hidden = Float[Array, "batch length width"]
Logits = Float[Array, "batch length vocabulary"]
Activation = Callable[[Array], Array]


class RMSNorm(nn.Module):
    """Numbers over their root mean square, times a scale, computed in float32.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*shape width"]) -> Float[Array, "*shape width"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])

        @computed_again
        def normalised(x: Array, scale: Array) -> Array:
            wide = x.astype(jnp.float32)
            mean = jnp.square(wide).mean(axis=-1, keepdims=True)
            over_root = wide * jax.lax.rsqrt(mean + self.epsilon)
            return over_root.astype(x.dtype) * scale.astype(x.dtype)

        return normalised(x, scale)


class GatedFeedForward(nn.Module):
    """A gated feed-forward layer: down(act(gate x) · up x) (Shazeer, GLU Variants, 2020).

    Attributes:
      width: how many numbers there are inside.
      act: the activation.
      dtype: the dtype of its products.
    """

    width: int
    act: Activation
    dtype: Any

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        gate, up = (
            nn.Dense(self.width, use_bias=False, dtype=self.dtype, name=name)
            for name in ("gate", "up")
        )
        down = nn.Dense(hidden.shape[-1], use_bias=False, dtype=self.dtype, name="down")

        @computed_again
        def gated(gate: Array, up: Array) -> Array:
            return self.act(gate) * up

        return down(gated(gate(hidden), up(hidden)))


def embedded(tokens: Tokens, embed: nn.Embed, prompt: Array | None) -> Hidden:
    """Returns the embeddings of tokens, of which -1, -2, ... are the vectors of a soft prompt.

    Args:
      tokens: the tokens.
      embed: the embedding.
      prompt: the vectors, if there are any.
    """
    if prompt is None:
        return embed(tokens)
    own = embed(jnp.maximum(tokens, 0))
    vectors = prompt.astype(own.dtype)[jnp.maximum(-1 - tokens, 0)]
    return jnp.where(tokens[..., None] < 0, vectors, own)


def cut_along(hidden: Hidden, cut: PartitionSpec | None) -> Hidden:
    """Returns hidden states cut over the mesh at hand, or as they are without a cut."""
    return hidden if cut is None else jax.lax.with_sharding_constraint(hidden, cut)


def rows_of(cut: PartitionSpec | None) -> PartitionSpec | None:
    """Returns a cut along the batch alone: that of hidden states of which any may be asked for."""
    return None if cut is None else PartitionSpec(cut[0])


def stack_of(
    layer: type[nn.Module], length: int, *, shared: int, remat: bool
) -> Callable[..., Any]:
    """Returns the class of a stack of layers that is scanned over, its parameters stacked.

    The stack is called with what layers hand on, such as the hidden states; with what each layer
    has of its own, stacked; and with `shared` arguments that all layers have. It returns what the
    last layer hands on, and what the layers return beside it, stacked.

    Args:
      layer: the class of a layer.
      length: how many there are.
      shared: how many arguments all of them have.
      remat: whether the backward pass computes each layer again instead of keeping what is inside.
    """
    stack: Callable[..., Any] = nn.scan(
        nn.remat(layer, prevent_cse=False) if remat else layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, *[nn.broadcast] * shared),
        length=length,
    )
    return stack


# Its slope is computed from the input alone, so that the backward pass keeps one array of the
# model's widest shape instead of three.
@jax.checkpoint
def _gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·Φ(x) with Φ(x) = (1 + erf(x/√2))/2, as PyTorch computes it.

    `jax.nn.gelu` uses erfc, which is more exact far below zero and three times as slow.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


# By Hugging Face's names.
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": _gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
