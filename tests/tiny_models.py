"""Random parameters of small language models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def random_params(model: Any, *, inputs: int, seed: int = 0) -> Any:
    """Returns random parameters of a Flax module, norms around one.

    Args:
      model: the module.
      inputs: how many arrays of tokens it is called with.
      seed: another one gives other numbers.
    """
    tokens = [jax.ShapeDtypeStruct((1, 1), jnp.int32)] * inputs
    shapes = jax.eval_shape(model.init, jax.random.key(0), *tokens)["params"]
    random = np.random.default_rng(seed)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = random.normal(size=shape.shape).astype(np.float32)
        return jnp.asarray(1 + numbers / 10 if path[-1].key == "scale" else numbers / 5)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
