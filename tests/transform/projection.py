"""One product with one weight, adapted as if it were trained."""

from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from tests.arrays import random
from tests.trained import as_if_trained

KEY = jax.random.key(6)


def trained(**shapes: tuple[int, ...]) -> Any:
    params = {name: random(*shape, seed=i) / 4 for i, (name, shape) in enumerate(shapes.items())}
    wrapped = lora_jax.wrap(params, ".*", rank=2, alpha=3.0)
    return as_if_trained(wrapped)


WRAPPED = trained(W=(24, 24))
MERGED = lora_jax.merge(WRAPPED)
X = random(5, 24, seed=30)


def project(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["W"])


def with_options(
    params: Any, x: Any, mode: Any = None, *, train: bool = False, activation: Any = jnp.tanh
) -> jax.Array:
    assert isinstance(train, bool)
    h = activation(x @ params["W"])
    return h * 2 if train else h[:1] if mode == "first" else h
