"""The shapes of a model's parameters, which no device needs to compute."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# Of a model that takes tokens: one text of one token.
ONE_TOKEN = jax.ShapeDtypeStruct((1, 1), jnp.int32)


def param_shapes(
    network: nn.Module, *inputs: jax.ShapeDtypeStruct, dtype: Any = jnp.float32
) -> Any:
    """Returns the shapes of the parameters, all of one dtype.

    Args:
      network: the module.
      *inputs: the shapes of some inputs that it takes.
      dtype: the dtype.
    """
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
