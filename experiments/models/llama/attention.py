"""Rotary positions, which tokens see which, and attention in spans and blocks of queries."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from experiments.models.llama.config import LlamaConfig
from experiments.models.llama.recomputing import computed_again

Tokens = Int[Array, "batch length"]
Heads = Float[Array, "batch length heads dim"]
# Keys and values, in the order in which products read them.
Shared = Float[Array, "batch shared length dim"]

# So many queries have their scores in memory at a time.
QUERIES_OF_BLOCK = 512

# A row is taken in so many spans, unless they had fewer queries than this.
SPANS, LEAST_SPAN = 4, 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens are: a token sees those of its own segment that are not behind it.

    Attributes:
      positions: the place of each token in its segment.
      segments: which of the texts in a row it belongs to, from 1 on; 0 is padding, which no token
        sees.
    """

    positions: Tokens
    segments: Tokens

    def at(self, part: slice) -> "Places":
        """Returns the places of a part of each row."""
        return Places(self.positions[:, part], self.segments[:, part])


def visible(queries: Places, keys: Places, window: int | None) -> Bool[Array, "batch queries keys"]:
    """Returns which of the keys each query sees."""
    behind = queries.positions[:, :, None] - keys.positions[:, None, :]
    same = queries.segments[:, :, None] == keys.segments[:, None, :]
    seen = same & (behind >= 0) & (keys.segments[:, None, :] != 0)
    return seen if window is None else seen & (behind < window)


def rotary_angles(config: LlamaConfig, positions: Tokens) -> Float[Array, "batch length half"]:
    r"""Returns $p\,\theta^{-2i/d}$ for each position p and pair i, in radians.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
    """
    half = config.head_dim // 2
    rates = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return positions[..., None].astype(jnp.float32) * _scaled(config, rates)


def _scaled(config: LlamaConfig, rates: Float[Array, "half"]) -> Float[Array, "half"]:
    """Returns rates as Llama 3 has them: slow ones divided by a factor, fast ones as they are."""
    scaling = config.rope_scaling
    if config.rope_divisors is not None:
        return rates / jnp.asarray(config.rope_divisors, rates.dtype)
    if scaling is None:
        return rates
    turns = scaling.original_max_position_embeddings * rates / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    is_fast = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - is_fast) * rates / scaling.factor + is_fast * rates


def rotated(x: Heads, angles: Float[Array, "batch length half"]) -> Heads:
    """Returns heads, the two halves of each rotated by the angles, computed in float32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attention(
    query: Heads,
    key: Shared,
    value: Shared,
    queries: Places,
    keys: Places,
    window: int | None,
    *,
    in_order: bool,
) -> Heads:
    """Returns the mean of the values that each query sees, weighted by softmax(q·k / √dim).

    Several heads of queries share one of keys and values (Ainslie et al., GQA, 2023). The backward
    pass computes scores again: kept for it are queries, keys and values alone.

    Args:
      query: the heads of queries.
      key: the keys.
      value: the values.
      queries: where the queries are.
      keys: where the keys are.
      window: how many tokens a query sees; None for all.
      in_order: whether queries and keys are the same tokens, those of each text in their order. No
        query then sees a key after it in the row: with four spans of queries, each of which leaves
        out the keys behind its end, 5/8 of the scores are left to compute.
    """
    length = query.shape[1]
    size = max(-(-length // SPANS), LEAST_SPAN) if in_order else length

    @computed_again
    def of_spans(query: Heads, key: Shared, value: Shared) -> Heads:
        def of_span(start: int) -> Heads:
            own = slice(start, start + size)
            seen = slice(0, start + size) if in_order else slice(None)
            return _in_blocks(
                query[:, own],
                key[:, :, seen],
                value[:, :, seen],
                queries.at(own),
                keys.at(seen),
                window,
            )

        return jnp.concatenate([of_span(start) for start in range(0, length, size)], axis=1)

    return of_spans(query, key, value)


def _in_blocks(
    query: Heads, key: Shared, value: Shared, queries: Places, keys: Places, window: int | None
) -> Heads:
    """Returns the same for blocks of queries, one after the other.

    The backward pass computes their scores again, so that the matrix of all scores is never in
    memory.
    """
    length, block = query.shape[1], QUERIES_OF_BLOCK
    if length <= block:
        return _of_block(query, key, value, queries, keys, window)
    count = -(-length // block)

    def in_blocks(array: Array) -> Array:
        # What is filled up belongs to no segment, and is cut off again.
        filled = [(0, 0)] * array.ndim
        filled[1] = (0, count * block - length)
        shape = (array.shape[0], count, block, *array.shape[2:])
        return jnp.moveaxis(jnp.pad(array, filled).reshape(shape), 1, 0)

    @computed_again
    def of_block(block_of: tuple[Heads, Places]) -> Heads:
        own_query, own_places = block_of
        return _of_block(own_query, key, value, own_places, keys, window)

    blocks = jax.lax.map(of_block, jax.tree.map(in_blocks, (query, queries)))
    whole = jnp.moveaxis(blocks, 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :length]


def _of_block(
    query: Heads, key: Shared, value: Shared, queries: Places, keys: Places, window: int | None
) -> Heads:
    batch, length, heads, dim = query.shape
    shared = key.shape[1]
    # The heads that share a key are rows of one product. Only what is small is transposed: with
    # other orders of axes, XLA transposes scores.
    grouped = query.reshape(batch, length, shared, heads // shared, dim).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, shared, -1, dim)
    scores = jnp.einsum("bkrd,bksd->bkrs", rows, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(*grouped.shape[:-1], -1)
    seen = visible(queries, keys, window)[:, None, None]
    # Not minus infinity: a query of padding sees nothing.
    scores = jnp.where(seen, scores * dim**-0.5, jnp.finfo(scores.dtype).min)
    shares = jax.nn.softmax(scores).astype(value.dtype).reshape(batch, shared, rows.shape[2], -1)
    mixed = jnp.einsum("bkrs,bksd->bkrd", shares, value)
    return mixed.reshape(grouped.shape).transpose(0, 3, 1, 2, 4).reshape(query.shape)
