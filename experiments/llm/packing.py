"""Rows of tokens: several examples in a row, none of which sees another.

What a batch learns is said by places: the loss is computed there and nowhere else. Rows that are on
one device, or on devices that share them, are a group; each group has its own places, so that no
device asks another for them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from experiments.llm.texts import TokenizedExample
from experiments.models.attention import Places

# Rows of one example each are filled up to a multiple of this, and so are those of answers.
_LENGTHS = 64


class Source(NamedTuple):
    """What an encoder reads, in rows as the tokens of a `Batch` are.

    Attributes:
      tokens: the tokens of each row; 0 where a row is filled up.
      positions: the place of each token in its text.
      segments: which example of the row it belongs to, from 1 on; 0 where a row is filled up.
    """

    tokens: Int[np.ndarray, "rows source"]
    positions: Int[np.ndarray, "rows source"]
    segments: Int[np.ndarray, "rows source"]


class Batch(NamedTuple):
    """Rows of tokens, and what the model learns from them.

    Attributes:
      tokens: the tokens of each row; 0 where a row is filled up.
      positions: the place of each token in its example.
      segments: which example of the row it belongs to, from 1 on; 0 where a row is filled up.
      places: places in the flattened rows of each group, after which a token is learned.
      targets: the tokens that are learned there.
      weights: 1, or 0 where there are fewer places than `places` has room for.
      owners: which example of the batch, by its number among them, learns there.
      source: what an encoder reads; None for a model without one.
    """

    tokens: Int[np.ndarray, "rows length"]
    positions: Int[np.ndarray, "rows length"]
    segments: Int[np.ndarray, "rows length"]
    places: Int[np.ndarray, "groups learned"]
    targets: Int[np.ndarray, "groups learned"]
    weights: Float[np.ndarray, "groups learned"]
    owners: Int[np.ndarray, "groups learned"]
    source: Source | None = None

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What `hidden_states` of the model is called with."""
        if self.source is None:
            return self.tokens, self.positions, self.segments
        source = self.source
        return (
            source.tokens,
            self.tokens,
            Places(source.positions, source.segments),
            Places(self.positions, self.segments),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of a row, which a program is compiled for."""
        own = (self.tokens.shape[-1],)
        return own if self.source is None else (self.source.tokens.shape[-1], *own)

    @property
    def seen(self) -> Any:
        """How many tokens of examples there are."""
        own = (self.segments != 0).sum()
        return own if self.source is None else own + (self.source.segments != 0).sum()


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


def learned_count(examples: Sequence[TokenizedExample], rows: Sequence[Row]) -> int:
    """Returns how many tokens of these rows are learned: never the first of an example."""
    return sum(int(examples[number].learned[1:].sum()) for row in rows for number in row.numbers)


def batch_of(
    examples: Sequence[TokenizedExample],
    rows: Sequence[Row],
    *,
    length: int,
    room: int,
    source_length: int | None = None,
    groups: int = 1,
) -> Batch:
    """Returns rows as a batch.

    Args:
      examples: all examples.
      rows: the rows of this batch.
      length: the number of tokens of a row.
      room: the number of places of a group, at least `learned_count` of its rows.
      source_length: the number of tokens of a row of the source, where an encoder reads one.
      groups: into how many groups the rows are divided, in their order; they are a multiple.
    """
    in_rows = [[examples[number] for number in row.numbers] for row in rows]
    texts = [[each.tokens for each in row] for row in in_rows]
    tokens, positions, segments = _filled_up(texts, length)
    source = None
    if source_length is not None:
        sources = [[each.source for each in row] for row in in_rows]
        source = Source(*_filled_up(sources, source_length))
    places, targets, weights, owners = (
        np.zeros((groups, room), dtype) for dtype in (np.int32, np.int32, np.float32, np.int32)
    )
    rows_of_group = len(rows) // groups
    used, owner = [0] * groups, 0
    for row_number, row in enumerate(rows):
        group, row_of_group = divmod(row_number, rows_of_group)
        start = 0
        for number in row.numbers:
            example = examples[number]
            learned = np.flatnonzero(example.learned[1:])
            own = slice(used[group], used[group] + len(learned))
            if own.stop > room:
                raise ValueError(
                    f"`room` is {room}; expected at least {own.stop}, what is learned."
                )
            places[group, own] = row_of_group * length + start + learned
            targets[group, own] = example.tokens[1:][learned]
            weights[group, own] = 1
            owners[group, own] = owner
            used[group], owner = own.stop, owner + 1
            start += len(example.tokens)
    return Batch(tokens, positions, segments, places, targets, weights, owners, source)


def _filled_up(rows: Sequence[Sequence[Any]], length: int) -> tuple[np.ndarray, ...]:
    """Returns the tokens, the positions and the segments of rows of texts."""
    tokens, positions, segments = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    for row, texts in enumerate(rows):
        start = 0
        for segment, text in enumerate(texts, start=1):
            part = slice(start, start + len(text))
            tokens[row, part] = text
            positions[row, part] = np.arange(len(text))
            segments[row, part] = segment
            start += len(text)
    return tokens, positions, segments


def stacked(batches: Sequence[Batch]) -> Batch:
    """Returns batches of one shape along a first axis."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


@dataclass(frozen=True)
class _Step:
    """Which rows are in the batches of a step.

    Attributes:
      length: the tokens of a row, of the source where there is one.
      batches: the rows of each batch.
    """

    length: int
    batches: tuple[tuple[Row, ...], ...]


class TrainingSteps:
    """The batches of each step of a training, the same each time that they are asked for.

    Packed rows are all of one length. Rows of one example each are as long as a multiple of 64 that
    has room for it, and those of one length are in a step together. In each epoch the examples are
    in another order; the last step of a length may have rows that are empty.
    """

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        *,
        rows: int,
        length: int,
        epochs: int,
        seed: int,
        accumulate: int = 1,
        together: int = 1,
        pack: bool = True,
        groups: int = 1,
    ) -> None:
        """Plans the steps.

        Args:
          examples: the examples, none longer than `length`.
          rows: the rows of a batch.
          length: the tokens of a row, or of the longest one.
          epochs: how often each example is seen.
          seed: decides the order.
          accumulate: the batches of a step.
          together: how many examples, one after the other, are in one row whatever happens.
          pack: whether a row has several examples.
          groups: into how many groups the rows of a batch are divided.
        """
        self._examples, self._rows, self._accumulate = tuple(examples), rows, accumulate
        self._together, self._groups = together, groups
        self._steps = [
            step
            for epoch in range(epochs)
            for step in self._epoch(np.random.default_rng((seed, epoch)), length, pack=pack)
        ]
        self._has_sources = self._examples[0].source is not None
        self._room: dict[int, int] = {}
        self._written: dict[int, int] = {}
        for step in self._steps:
            most = max(
                learned_count(self._examples, group)
                for batch in step.batches
                for group in _divided(batch, rows // groups)
            )
            self._room[step.length] = max(most, self._room.get(step.length, 1))
            written = max(self._written_count(row) for batch in step.batches for row in batch)
            self._written[step.length] = max(written, self._written.get(step.length, 1))

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, number: int) -> Batch:
        """Returns the batches of one step, stacked along a first axis."""
        step = self._steps[number]
        batches = [
            batch_of(
                self._examples,
                [*batch, *[Row(())] * (self._rows - len(batch))],
                length=self._length_of(step),
                room=self._room[step.length],
                source_length=step.length if self._has_sources else None,
                groups=self._groups,
            )
            for batch in step.batches
        ]
        return stacked(batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def batches(self) -> Iterator[Batch]:
        """Yields the batches of all steps one by one."""
        for step in self:
            for number in range(self._accumulate):
                yield jax.tree.map(lambda array, number=number: array[number], step)

    def first_of_each_length(self) -> list[Batch]:
        """Returns a step of each length of rows, of which each needs a program of its own."""
        numbers = {step.length: number for number, step in reversed(list(enumerate(self._steps)))}
        return [self[number] for _, number in sorted(numbers.items())]

    @property
    def digest(self) -> str:
        """Tells these examples apart from others."""
        found = hashlib.sha256()
        for example in self._examples:
            found.update(example.tokens.tobytes())
            found.update(example.learned.tobytes())
            found.update(b"" if example.source is None else example.source.tobytes())
        return found.hexdigest()

    @property
    def fullness(self) -> float:
        """The part of the rows that is tokens of examples."""
        used = sum(
            self._examples[number].count
            for step in self._steps
            for batch in step.batches
            for row in batch
            for number in row.numbers
        )
        return used / sum(
            (self._length_of(step) + step.length * self._has_sources)
            * (self._rows * self._accumulate)
            for step in self._steps
        )

    def _written_count(self, row: Row) -> int:
        return sum(len(self._examples[number].tokens) for number in row.numbers)

    def _length_of(self, step: _Step) -> int:
        """Returns how long the rows of tokens are: those of answers have room for the longest."""
        if not self._has_sources:
            return step.length
        return min(-(-self._written[step.length] // _LENGTHS) * _LENGTHS, step.length)

    def _epoch(self, random: np.random.Generator, length: int, *, pack: bool) -> list[_Step]:
        own = [len(example) for example in self._examples]
        units = _divided(own, self._together)
        lengths = [sum(unit) for unit in units]
        order = random.permutation(len(units)).tolist()
        if pack:
            rows_of = {length: packed_rows(lengths, order, length)}
        else:
            rows_of = _rows_by_length(lengths, order, length)
        steps = []
        for size, rows in rows_of.items():
            # What fits best is long or late: without another shuffle, steps would be alike.
            random.shuffle(rows)
            of_batches = _divided([self._of_examples(row) for row in rows], self._rows)
            of_steps = _divided(of_batches, self._accumulate)
            steps += [
                _Step(size, tuple(batches) + ((),) * (self._accumulate - len(batches)))
                for batches in of_steps
            ]
        random.shuffle(steps)
        return steps

    def _of_examples(self, row: Row) -> Row:
        """Returns a row of examples for one of units."""
        return Row(
            tuple(
                self._together * number + place
                for number in row.numbers
                for place in range(self._together)
            )
        )


def _rows_by_length(
    lengths: Sequence[int], order: Sequence[int], longest: int
) -> dict[int, list[Row]]:
    """Returns a row for each example, by the length that it is filled up to."""
    rows: dict[int, list[Row]] = {}
    for number in order:
        size = min(-(-lengths[number] // _LENGTHS) * _LENGTHS, longest)
        rows.setdefault(size, []).append(Row((number,)))
    return rows


def _divided(parts: Sequence[Any], size: int) -> list[tuple[Any, ...]]:
    return [tuple(parts[start : start + size]) for start in range(0, len(parts), size)]
