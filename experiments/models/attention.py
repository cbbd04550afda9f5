"""Which tokens see which, and attention in spans and blocks of queries."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from experiments.models.recomputing import computed_again
from experiments.models.score_products import mixed, scores_of

Tokens = Int[Array, "batch length"]
Heads = Float[Array, "batch length heads dim"]
# Keys and values, in the order in which products read them.
Shared = Float[Array, "batch shared length dim"]
Pair = tuple[Shared, Shared]

# So many queries have their scores in memory at a time.
QUERIES_OF_BLOCK = 512

# A row is taken in so many spans, unless they had fewer queries than this.
SPANS, LEAST_SPAN = 4, 128


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

    def at(self, part: slice) -> "Places":
        """Returns the places of a part of each row."""
        return Places(self.positions[:, part], self.segments[:, part])


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


def in_read_order(array: Heads) -> Shared:
    """Returns keys or values in the order in which products read them."""
    return array.swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How the score of a query and a key is made: scale · q·k + bias, of the keys that it sees.

    Attributes:
      sees: which keys a query sees.
      scale: what products of queries and keys are multiplied by.
      bias: what is added to them, if anything.
    """

    sees: Sees
    scale: float
    bias: Bias | None = None


def attention(
    query: Heads, pair: Pair, queries: Places, keys: Places, scoring: Scoring, *, in_order: bool
) -> Heads:
    """Returns the mean of the values that each query sees, weighted by the softmax of its scores.

    Several heads of queries may share one of keys and values (Ainslie et al., GQA, 2023). The
    backward pass computes scores again: kept for it are queries, keys and values alone.

    Args:
      query: the heads of queries.
      pair: the keys and the values.
      queries: where the queries are.
      keys: where the keys are.
      scoring: how scores are made.
      in_order: whether queries and keys are the same tokens, those of each text in their order, and
        no query sees a key after it: with four spans of queries, each of which leaves out the keys
        behind its end, 5/8 of the scores are left to compute.
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
                (key[:, :, seen], value[:, :, seen]),
                queries.at(own),
                keys.at(seen),
                scoring,
            )

        return jnp.concatenate([of_span(start) for start in range(0, length, size)], axis=1)

    return of_spans(query, *pair)


def _in_blocks(query: Heads, pair: Pair, queries: Places, keys: Places, scoring: Scoring) -> Heads:
    """Returns the same for blocks of queries, one after the other.

    The backward pass computes their scores again, so that the matrix of all scores is never in
    memory.
    """
    length, block = query.shape[1], QUERIES_OF_BLOCK
    if length <= block:
        return _of_block(query, pair, queries, keys, scoring)
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
        return _of_block(own_query, pair, own_places, keys, scoring)

    blocks = jax.lax.map(of_block, jax.tree.map(in_blocks, (query, queries)))
    whole = jnp.moveaxis(blocks, 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :length]


def _of_block(query: Heads, pair: Pair, queries: Places, keys: Places, scoring: Scoring) -> Heads:
    key, value = pair
    batch, length, heads, dim = query.shape
    shared = key.shape[1]
    # The heads that share a key are rows of one product. Only what is small is transposed: with
    # other orders of axes, XLA transposes scores.
    grouped = query.reshape(batch, length, shared, heads // shared, dim).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, shared, -1, dim)
    scores = scores_of(rows, key).reshape(*grouped.shape[:-1], -1) * scoring.scale
    if scoring.bias is not None:
        scores += scoring.bias(queries, keys).reshape(scores.shape)
    # Not minus infinity: a query of padding sees nothing.
    seen = scoring.sees(queries, keys)[:, None, None]
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    shares = jax.nn.softmax(scores).astype(value.dtype).reshape(batch, shared, rows.shape[2], -1)
    seen_values = mixed(shares, value).reshape(grouped.shape)
    return seen_values.transpose(0, 3, 1, 2, 4).reshape(query.shape)
