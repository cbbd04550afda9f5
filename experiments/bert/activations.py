"""The activations of BERT's dense layers, by Hugging Face's names."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
from jaxtyping import Array, Float


# Its slope is computed from the input alone: what is kept between forward and backward pass is one
# array of the widest shape there is, and not three.
@jax.checkpoint
def _gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x·Φ(x) with Φ(x) = (1 + erf(x/√2))/2, as PyTorch computes it.

    `jax.nn.gelu` takes erfc, which is more exact far below zero, and three times as slow.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
