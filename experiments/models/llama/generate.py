"""Texts that a model writes token by token, with a cache of keys and values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.models.llama.attention import Tokens
from experiments.models.llama.cache import Cache
from experiments.models.llama.model import Llama

Apply = Callable[..., Any]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: what logits are divided by; 0 takes the likeliest token.
      top_p: the least likely tokens are left out whose probabilities sum to 1 - top_p (Holtzman et
        al., The Curious Case of Neural Text Degeneration, 2020).
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def drawn(
        self, logits: Float[Array, "batch vocabulary"], key: PRNGKeyArray | None
    ) -> Int[Array, "batch"]:
        """Returns a token for each row; it needs no key where it takes the likeliest."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if key is None:
            raise ValueError("`key` is None; expected a key, from which tokens are drawn.")
        logits = logits.astype(jnp.float32) / self.temperature
        order = jnp.argsort(-logits, axis=-1)
        sorted_logits = jnp.take_along_axis(logits, order, axis=-1)
        shares = jax.nn.softmax(sorted_logits)
        # What comes before a token: the likeliest is always kept.
        before = jnp.cumsum(shares, axis=-1) - shares
        kept = jnp.where(before < self.top_p, sorted_logits, -jnp.inf)
        places = jax.random.categorical(key, kept)[:, None]
        return jnp.take_along_axis(order, places, axis=-1)[:, 0].astype(jnp.int32)


GREEDY = Sampling()


def generate(
    apply: Apply,
    params: Any,
    model: Llama,
    tokens: Tokens,
    lengths: Int[Array, "batch"],
    *,
    new_tokens: int,
    end_ids: Sequence[int],
    sampling: Sampling = GREEDY,
    key: PRNGKeyArray | None = None,
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
      sampling: how each token is drawn; the likeliest by default.
      key: a key for drawing.
    """
    batch, width = tokens.shape
    logits, cache = read_prompts(apply, params, model, tokens, lengths, capacity=width + new_tokens)
    ends = jnp.asarray(end_ids)

    def drawn(logits: Array, place: Any) -> Array:
        return sampling.drawn(logits, None if key is None else jax.random.fold_in(key, place))

    def is_unfinished(state: Any) -> Array:
        place, _, is_over, *_ = state
        return (place < new_tokens) & ~jnp.all(is_over)

    def step(state: Any) -> Any:
        place, token, is_over, cache, written = state
        written = written.at[place].set(token)
        is_over = is_over | jnp.isin(token, ends)
        logits, cache = read_token(apply, params, token, lengths + place, cache)
        following = jnp.where(is_over, token, drawn(logits, place + 1))
        return place + 1, following, is_over, cache, written

    first, nothing = drawn(logits, 0), jnp.zeros((new_tokens, batch), jnp.int32)
    start = jnp.int32(0), first, jnp.zeros(batch, bool), cache, nothing
    end, last, _, _, written = jax.lax.while_loop(is_unfinished, step, start)
    written = jnp.where(jnp.arange(new_tokens)[:, None] < end, written, last)
    return written.T


def read_prompts(
    apply: Apply,
    params: Any,
    model: Llama,
    tokens: Tokens,
    lengths: Int[Array, "batch"],
    *,
    capacity: int,
) -> tuple[Float[Array, "batch vocabulary"], Cache]:
    """Returns the logits of the token after each prompt, and a cache with room for more.

    Args:
      apply: as for `generate`, and so the next four.
      params: see there.
      model: see there.
      tokens: see there.
      lengths: see there.
      capacity: how many tokens the cache has room for, those that fill prompts up among them.
    """
    batch, width = tokens.shape
    cache = Cache.empty(model.config, batch, capacity, model.dtype)
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    is_prompt = (jnp.arange(width) < lengths[:, None]).astype(jnp.int32)
    variables = {"params": params}
    hidden, cache = apply(variables, tokens, cache, positions, is_prompt, method=Llama.with_cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return apply(variables, last, method=Llama.logits)[:, 0], cache


def read_token(
    apply: Apply,
    params: Any,
    token: Int[Array, "batch"],
    positions: Int[Array, "batch"],
    cache: Cache,
) -> tuple[Float[Array, "batch vocabulary"], Cache]:
    """Returns the logits of what follows one more token of each row, and the longer cache."""
    variables, segments = {"params": params}, jnp.ones((len(token), 1), jnp.int32)
    hidden, cache = apply(
        variables, token[:, None], cache, positions[:, None], segments, method=Llama.with_cache
    )
    return apply(variables, hidden, method=Llama.logits)[:, 0], cache
