"""Batches of sentences of similar length, so that few shapes are compiled and little is padding.

A sentence is padded to the shortest of a few lengths that holds it. Sentences that do not fill a
batch of their length move on to the next length, so that at most one batch is not full.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32
from numpy.typing import NDArray

from experiments.common.errors import InputError
from experiments.data.dataset import Labels

_SHORTEST = 8

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class TokenizedTexts:
    """The tokens of each sentence, its class, and the token for padding.

    Attributes:
      token_ids: the tokens of each sentence, including those that mark its beginning and end.
      labels: the number of each sentence's class.
      padding_id: the token that follows the end of a sentence.
      truncated: how many of the sentences were longer and have been cut off.
    """

    token_ids: tuple[NDArray[np.int32], ...]
    labels: Labels
    padding_id: int
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


class TokenBatch(NamedTuple):
    """Sentences of similar length; a pytree, so that a compiled step takes it as it is.

    Attributes:
      token_ids: the tokens, padded to one length.
      mask: which of them are tokens of the sentence.
      labels: the number of each sentence's class.
      weights: those of a loss's mean: 1 for a sentence, 0 for a row that only fills the batch.
      rows: which sentence of the texts each row is; -1 for a row that only fills the batch.
    """

    token_ids: Int32[np.ndarray, "batch length"]
    mask: Bool[np.ndarray, "batch length"]
    labels: Int32[np.ndarray, " batch"]
    weights: Float32[np.ndarray, " batch"]
    rows: Int32[np.ndarray, " batch"]


@dataclass(frozen=True)
class Position:
    """How far training has come: finished epochs, and finished batches of the current one."""

    seed: int
    epoch: int
    index: int


class TrainingBatches:
    """Epochs of batches, each in an order of its own that the seed and its number decide.

    All batches are full. If the batch size does not divide the number of sentences, each epoch
    leaves out a remainder of its own.
    """

    def __init__(
        self,
        texts: TokenizedTexts,
        *,
        batch_size: int,
        epochs: int,
        seed: int,
        lengths: Sequence[int],
    ) -> None:
        """Takes the texts, and the lengths that they are padded to; see `lengths_up_to`."""
        if batch_size > len(texts):
            raise InputError(
                f"--batch-size {batch_size} is more than the {len(texts)} training examples"
            )
        self._texts = texts
        self._batch_size = batch_size
        self._epochs = epochs
        self._seed = seed
        self._lengths = tuple(lengths)
        self._places = _places(texts, self._lengths)

    @property
    def per_epoch(self) -> int:
        return len(self._texts) // self._batch_size

    def __len__(self) -> int:
        return self._epochs * self.per_epoch

    def __iter__(self) -> Iterator[TokenBatch]:
        return self.starting_at(self.position(0))

    def position(self, done: int) -> Position:
        """Returns the position after so many batches."""
        return Position(self._seed, *divmod(done, self.per_epoch))

    def starting_at(self, position: Position) -> Iterator[TokenBatch]:
        """Yields the batches from there on: the same as in a run without interruption."""
        if position.seed != self._seed:
            raise InputError(
                f"--seed is {self._seed}, but training began with {position.seed}; pass that one"
            )
        if position.index >= self.per_epoch:
            raise InputError(
                f"training stopped at batch {position.index} of an epoch, but with this data and "
                f"--batch-size {self._batch_size} an epoch has {self.per_epoch}; pass the data and "
                "the batch size that it began with"
            )
        return self._from(position.epoch, position.index)

    def shapes(self, epoch: int = 0) -> dict[int, int]:
        """Returns how many batches of each length an epoch has."""
        plan = self._plan(epoch)
        found = {length: sum(one == length for one, _ in plan) for length in self._lengths}
        return {length: count for length, count in found.items() if count}

    def _from(self, epoch: int, index: int) -> Iterator[TokenBatch]:
        for number in range(epoch, self._epochs):
            for length, rows in self._plan(number)[index:]:
                yield _batch(self._texts, rows, length)
            index = 0

    def _plan(self, epoch: int) -> list[tuple[int, Rows]]:
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(len(self._texts))[: self.per_epoch * self._batch_size]
        plan = _plan(order, self._places, self._lengths, self._batch_size)
        return [plan[number] for number in random.permutation(len(plan))]


def evaluation_batches(
    texts: TokenizedTexts, *, batch_size: int, lengths: Sequence[int]
) -> list[TokenBatch]:
    """Returns batches with every sentence once; `in_order` undoes the sorting by length.

    All have the same number of rows: the last one is completed with rows of weight 0.
    """
    order = np.arange(len(texts))
    plan = _plan(order, _places(texts, lengths), lengths, batch_size)
    return [_batch(texts, _filled(rows, batch_size), length) for length, rows in plan]


def in_order(batches: Sequence[TokenBatch], outputs: Sequence[Any]) -> NDArray[Any]:
    """Returns the output for each sentence, from the outputs for each row of each batch."""
    rows = np.concatenate([batch.rows for batch in batches])
    values = np.concatenate([np.asarray(output) for output in outputs])
    ordered = np.empty((int(rows.max()) + 1, *values.shape[1:]), values.dtype)
    ordered[rows[rows >= 0]] = values[rows >= 0]
    return ordered


def lengths_up_to(longest: int) -> tuple[int, ...]:
    """Returns the lengths that sentences are padded to: 8, 16, 32, ... and the longest."""
    lengths, length = [], _SHORTEST
    while length < longest:
        lengths.append(length)
        length *= 2
    return (*lengths, longest)


def padding_share(batches: Sequence[TokenBatch]) -> float:
    """Returns the share of these batches that is padding."""
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    return 1 - tokens / sum(batch.mask.size for batch in batches)


def _places(texts: TokenizedTexts, lengths: Sequence[int]) -> NDArray[np.int64]:
    """Returns the index of the length that each sentence is padded to."""
    counts = np.array([len(ids) for ids in texts.token_ids], np.int64)
    if counts.max(initial=0) > max(lengths):
        raise ValueError(f"a sentence has {counts.max()} tokens, more than {max(lengths)}")
    return np.searchsorted(np.asarray(lengths), counts)


def _plan(
    order: Rows, places: NDArray[np.int64], lengths: Sequence[int], batch_size: int
) -> list[tuple[int, Rows]]:
    """Returns the length and the rows of each batch; only the last may have fewer rows."""
    plan: list[tuple[int, Rows]] = []
    left = order[:0]
    longest = lengths[0]
    for place, length in enumerate(lengths):
        of_length = order[places[order] == place]
        longest = length if len(of_length) else longest
        rows = np.concatenate([left, of_length])
        full = len(rows) // batch_size * batch_size
        plan += [(longest, batch) for batch in rows[:full].reshape(-1, batch_size)]
        left = rows[full:]
    return [*plan, (longest, left)] if len(left) else plan


def _filled(rows: Rows, batch_size: int) -> Rows:
    return np.pad(rows, (0, batch_size - len(rows)), constant_values=-1)


def _batch(texts: TokenizedTexts, rows: Rows, length: int) -> TokenBatch:
    token_ids = np.full((len(rows), length), texts.padding_id, np.int32)
    mask = np.zeros((len(rows), length), np.bool_)
    is_sentence = rows >= 0
    for place in np.flatnonzero(is_sentence):
        ids = texts.token_ids[rows[place]]
        token_ids[place, : len(ids)] = ids
        mask[place, : len(ids)] = True
    return TokenBatch(
        token_ids,
        mask,
        labels=np.where(is_sentence, texts.labels[rows], 0).astype(np.int32),
        weights=is_sentence.astype(np.float32),
        rows=rows.astype(np.int32),
    )
