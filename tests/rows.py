"""A small model with rows of its table adapted, for the tests of single rows."""

from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from tests.arrays import random

ROWS = [17, 5, 30]
PARAMS = {"embed": {"table": random(40, 6)}, "query": {"kernel": random(6, 6, seed=1)}}
IDS = jnp.array([[5, 3, 17, 5], [30, 39, 0, 17]])


def model(params: Any, ids: jax.Array) -> jax.Array:
    """Returns logits of a table that is looked up, and multiplied with transposed."""
    hidden = params["embed"]["table"][ids]
    hidden = jnp.tanh(hidden @ params["query"]["kernel"])
    return hidden @ params["embed"]["table"].T


adapted = lora_jax.adapt(model, on_materialize="error")


def wrapped_params(targets: Any = None, params: Any = PARAMS, **options: Any) -> Any:
    return lora_jax.wrap(params, targets or {"embed": {"rows": ROWS}}, rank=2, **options)


def beside_low_rank() -> Any:
    """Returns rows on top of a low-rank adapter of the same table, beside one of another weight."""
    return lora_jax.wrap(wrapped_params("embed|query"), {"embed": {"rows": ROWS}})


def loss(fn: Any) -> Any:
    def of_halves(adapters: Any, frozen: Any) -> jax.Array:
        return jnp.sum(jnp.sin(fn(lora_jax.combine(adapters, frozen), IDS)))

    return of_halves
