"""Rows of tokens: several examples in a row, none of which sees another.

What a batch learns is said by places: the loss is computed there and nowhere else.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from experiments.llm.examples import TokenizedExample


class Batch(NamedTuple):
    """Rows of tokens, and what the model learns from them.

    Attributes:
      tokens: the tokens of each row; 0 where a row is filled up.
      positions: the place of each token in its example.
      segments: which example of the row it belongs to, from 1 on; 0 where a row is filled up.
      places: places in the flattened rows, after which a token is learned.
      targets: the tokens that are learned there.
      weights: 1, or 0 where there are fewer places than `places` has room for.
    """

    tokens: Int[np.ndarray, "rows length"]
    positions: Int[np.ndarray, "rows length"]
    segments: Int[np.ndarray, "rows length"]
    places: Int[np.ndarray, "learned"]
    targets: Int[np.ndarray, "learned"]
    weights: Float[np.ndarray, "learned"]


@dataclass(frozen=True)
class Row:
    """Examples that are in one row, by their numbers."""

    numbers: tuple[int, ...]


def packed_rows(lengths: Sequence[int], order: Sequence[int], length: int) -> list[Row]:
    """Returns rows with as many examples as fit, each in the fullest row that has room for it.

    Args:
      lengths: the number of tokens of each example, at most `length`.
      order: the order in which examples are taken.
      length: the number of tokens of a row.
    """
    rows: list[list[int]] = []
    # The rows with each number of free tokens, so that a search does not look at all rows.
    with_free: list[list[int]] = [[] for _ in range(length + 1)]
    for number in order:
        free = next((n for n in range(lengths[number], length + 1) if with_free[n]), None)
        if free is None:
            rows.append([])
            place, free = len(rows) - 1, length
        else:
            place = with_free[free].pop()
        rows[place].append(number)
        with_free[free - lengths[number]].append(place)
    return [Row(tuple(numbers)) for numbers in rows]


def single_rows(order: Sequence[int]) -> list[Row]:
    """Returns a row for each example."""
    return [Row((number,)) for number in order]


def learned_count(examples: Sequence[TokenizedExample], rows: Sequence[Row]) -> int:
    """Returns how many tokens of these rows are learned: never the first of an example."""
    return sum(int(examples[number].learned[1:].sum()) for row in rows for number in row.numbers)


def batch_of(
    examples: Sequence[TokenizedExample], rows: Sequence[Row], *, length: int, room: int
) -> Batch:
    """Returns rows as a batch.

    Args:
      examples: all examples.
      rows: the rows of this batch.
      length: the number of tokens of a row.
      room: the number of places, at least `learned_count(examples, rows)`.
    """
    shape = (len(rows), length)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    places: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for row_number, row in enumerate(rows):
        start = 0
        for segment, number in enumerate(row.numbers, start=1):
            example = examples[number]
            part = slice(start, start + len(example))
            tokens[row_number, part] = example.tokens
            positions[row_number, part] = np.arange(len(example))
            segments[row_number, part] = segment
            learned = np.flatnonzero(example.learned[1:])
            places.append(row_number * length + start + learned)
            targets.append(example.tokens[1:][learned])
            start += len(example)
    return Batch(
        tokens,
        positions,
        segments,
        _filled(np.concatenate(places), room).astype(np.int32),
        _filled(np.concatenate(targets), room).astype(np.int32),
        _filled(np.ones(sum(map(len, places)), np.float32), room),
    )


def _filled(array: np.ndarray, room: int) -> np.ndarray:
    if len(array) > room:
        raise ValueError(f"`room` is {room}; expected at least {len(array)}, what is learned.")
    return np.pad(array, (0, room - len(array)))


class PackedBatches:
    """The batches of a training, the same each time that they are asked for.

    In each epoch the examples are packed in another order. All batches have one shape.
    """

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        *,
        rows: int,
        length: int,
        epochs: int,
        seed: int,
        pack: bool = True,
    ) -> None:
        """Packs the examples.

        Args:
          examples: the examples, none longer than `length`.
          rows: the rows of a batch.
          length: the tokens of a row.
          epochs: how often each example is seen.
          seed: decides the order.
          pack: whether a row has several examples.
        """
        self._examples, self._rows, self._length = tuple(examples), rows, length
        lengths = [len(example) for example in examples]
        self._batches: list[list[Row]] = []
        for epoch in range(epochs):
            order = np.random.default_rng((seed, epoch)).permutation(len(lengths)).tolist()
            packed = packed_rows(lengths, order, length) if pack else single_rows(order)
            # What fits best is long or late: without another shuffle, batches would be alike.
            np.random.default_rng((seed, epoch, 1)).shuffle(packed)
            self._batches += [packed[start : start + rows] for start in range(0, len(packed), rows)]
        counts = [learned_count(self._examples, batch) for batch in self._batches]
        self._room = max(counts)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Batch:
        """Returns one batch; the last of an epoch may have rows that are empty."""
        batch = self._batches[number]
        empty = [Row(())] * (self._rows - len(batch))
        return batch_of(self._examples, [*batch, *empty], length=self._length, room=self._room)

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    @property
    def digest(self) -> str:
        """Tells these examples apart from others."""
        found = hashlib.sha256()
        for example in self._examples:
            found.update(example.tokens.tobytes())
            found.update(example.learned.tobytes())
        return found.hexdigest()

    @property
    def fullness(self) -> float:
        """The part of the rows that is tokens of examples."""
        used = sum(
            len(self._examples[number])
            for batch in self._batches
            for row in batch
            for number in row.numbers
        )
        return used / (len(self._batches) * self._rows * self._length)
