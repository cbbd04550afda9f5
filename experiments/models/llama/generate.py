"""Texts that a model writes: the likeliest token each time, with a cache of keys and values."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from experiments.models.llama.attention import Tokens
from experiments.models.llama.model import Cache, Llama

Apply = Callable[..., Any]


def greedy(
    apply: Apply,
    params: Any,
    model: Llama,
    tokens: Tokens,
    lengths: Int[Array, "batch"],
    *,
    new_tokens: int,
    end_ids: Sequence[int],
) -> Int[Array, "batch new"]:
    """Returns the tokens that follow each prompt, and after the end of an answer its last token.

    Args:
      apply: `model.apply`, or what `lora_jax.adapt` makes of it.
      params: the parameters that it takes, plain or adapted.
      model: the model.
      tokens: the prompts, each padded at its end with any token.
      lengths: how many tokens of each row are the prompt.
      new_tokens: how many tokens to write at most.
      end_ids: the tokens that end an answer.
    """
    batch, width = tokens.shape
    cache = Cache.empty(model.config, batch, width + new_tokens, model.dtype)
    is_prompt = jnp.arange(width) < lengths[:, None]

    def run(tokens: Tokens, cache: Cache, positions: Tokens, segments: Tokens) -> Any:
        return apply(
            {"params": params}, tokens, cache, positions, segments, method=Llama.with_cache
        )

    def likeliest(hidden: Array) -> Array:
        logits = apply({"params": params}, hidden, method=Llama.logits)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    hidden, cache = run(tokens, cache, positions, is_prompt.astype(jnp.int32))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    first = likeliest(last)[:, 0]
    ends = jnp.asarray(end_ids)

    def step(state: Any, place: Array) -> tuple[Any, Array]:
        token, is_over, cache = state
        is_over = is_over | jnp.isin(token, ends)
        hidden, cache = run(
            token[:, None], cache, (lengths + place)[:, None], jnp.ones((batch, 1), jnp.int32)
        )
        following = jnp.where(is_over, token, likeliest(hidden)[:, 0])
        return (following, is_over, cache), token

    start = first, jnp.zeros(batch, bool), cache
    _, written = jax.lax.scan(step, start, jnp.arange(new_tokens))
    return written.T
