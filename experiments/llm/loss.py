"""The loss of a language model, computed at the places that are learned and in chunks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from experiments.llm.packing import Batch

Apply = Callable[..., Any]

# So many places of a group have their logits in memory at a time: 96 MB for 49,152 tokens.
CHUNK = 512


def losses_at_places(apply: Apply, params: Any, batch: Batch) -> Float[Array, "groups learned"]:
    """Returns the cross-entropy of each token that a batch learns, and 0 where there is none.

    Where there are more places than a chunk has, the logits of each chunk are computed, used and
    forgotten, and computed again in the backward pass: neither all tokens nor all places ever have
    theirs in memory.

    Args:
      apply: `apply` of a language model, or what `lora_jax.adapt` makes of it.
      params: what it takes as params.
      batch: the batch.
    """
    variables = {"params": params}
    hidden = apply(variables, *batch.inputs, method="hidden_states")
    groups, count = batch.places.shape
    of_groups = hidden.reshape(groups, -1, hidden.shape[-1])

    def of_chunk(chunk: tuple[Array, Array, Array]) -> Float[Array, "groups chunk"]:
        places, targets, weights = chunk
        learned = jnp.take_along_axis(of_groups, places[..., None], axis=1)
        logits = apply(variables, learned, method="logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), targets
        )
        return losses * weights

    whole = (batch.places, batch.targets, batch.weights)
    chunks = -(-count // CHUNK)
    if chunks <= 1:
        return of_chunk(whole)
    missing = -count % chunks

    def in_chunks(array: Array) -> Array:
        filled = jnp.pad(jnp.asarray(array), ((0, 0), (0, missing)))
        return jnp.moveaxis(filled.reshape(groups, chunks, -1), 1, 0)

    losses = jax.lax.map(jax.checkpoint(of_chunk), jax.tree.map(in_chunks, whole))
    return jnp.moveaxis(losses, 0, 1).reshape(groups, -1)[:, :count]
