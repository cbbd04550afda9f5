"""Which tokens see which, and attention in blocks of queries."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Tokens = Int[Array, "batch length"]
Heads = Float[Array, "batch length heads dim"]
Pair = tuple[Heads, Heads]

# So many queries have their scores in memory at a time.
QUERIES_OF_BLOCK = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens are in the texts that share a row.

    Attributes:
      positions: the place of each token in its segment.
      segments: which of the texts in a row it belongs to, from 1 on; 0 is padding, which no token
        sees.
    """

    positions: Tokens
    segments: Tokens

    @classmethod
    def of(cls, tokens: Tokens, positions: Tokens | None, segments: Tokens | None) -> "Places":
        """Returns the places of tokens that are one text from 0 on, unless it is said otherwise."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return cls(positions, jnp.ones_like(tokens) if segments is None else segments)


Seen = Bool[Array, "batch queries keys"]
# What says of each query which of the keys it sees.
Sees = Callable[[Places, Places], Seen]
# What is added to the score of each query and key.
Bias = Callable[[Places, Places], Float[Array, "batch heads queries keys"]]


def in_segment(queries: Places, keys: Places) -> Seen:
    """Says that a token sees all of its own segment."""
    same = queries.segments[:, :, None] == keys.segments[:, None, :]
    return same & (keys.segments[:, None, :] != 0)


def in_segment_so_far(queries: Places, keys: Places, *, window: int | None = None) -> Seen:
    """Says that a token sees those of its own segment that are not behind it.

    Args:
      queries: where the queries are.
      keys: where the keys are.
      window: how many tokens a token sees, itself included; all unless given.
    """
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen = in_segment(queries, keys) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def attention(
    query: Heads,
    pair: Pair,
    queries: Places,
    keys: Places,
    *,
    sees: Sees,
    scale: float,
    bias: Bias | None = None,
) -> Heads:
    """Returns the mean of the values that each query sees, weighted by softmax(scale · q·k + bias).

    Several heads of queries may share one of keys and values (Ainslie et al., GQA, 2023). Blocks of
    queries are taken one after the other, their scores computed again in the backward pass, so that
    the whole matrix of scores is never in memory.

    Args:
      query: the queries.
      pair: the keys and the values.
      queries: where the queries are.
      keys: where the keys are.
      sees: which keys a query sees.
      scale: what products of queries and keys are multiplied by.
      bias: what is added to them; nothing unless given.
    """

    def of(own: Heads, places: Places) -> Heads:
        scores = _scores(own, pair[0]) * scale
        if bias is not None:
            scores += bias(places, keys).reshape(scores.shape)
        # Not minus infinity: a query of padding sees nothing.
        seen = sees(places, keys)[:, None, None]
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
        shares = jax.nn.softmax(scores).astype(pair[1].dtype)
        return jnp.einsum("bkgqs,bskd->bqkgd", shares, pair[1]).reshape(own.shape)

    length, block = query.shape[1], QUERIES_OF_BLOCK
    if length <= block:
        return of(query, queries)
    count = -(-length // block)

    def in_blocks(array: Array) -> Array:
        # What is filled up belongs to no segment, and is cut off again.
        filled = [(0, 0)] * array.ndim
        filled[1] = (0, count * block - length)
        shape = (array.shape[0], count, block, *array.shape[2:])
        return jnp.moveaxis(jnp.pad(array, filled).reshape(shape), 1, 0)

    of_block = jax.checkpoint(lambda parts: of(*parts))
    blocks = jax.lax.map(of_block, jax.tree.map(in_blocks, (query, queries)))
    whole = jnp.moveaxis(blocks, 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :length]


def _scores(query: Heads, key: Heads) -> Float[Array, "batch shared group queries keys"]:
    """Returns the products in float32, each head of keys with its group of heads of queries."""
    batch, length, heads, dim = query.shape
    shared = key.shape[2]
    grouped = query.reshape(batch, length, shared, heads // shared, dim)
    return jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32)
