"""Batches of a split, gathered on the host, in an order that only the seed decides."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from experiments.common.errors import InputError
from experiments.data.dataset import Labels, Split

Batch = tuple[NDArray[np.generic], Labels]


class Batches:
    """A known number of batches of rows of a split."""

    def __init__(self, split: Split, rows: NDArray[np.int64]) -> None:
        """Takes the rows of each batch: (batches, batch size)."""
        self._split = split
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._rows:
            yield self._split.inputs[rows], self._split.labels[rows]


def epoch_batches(
    split: Split, *, batch_size: int, epochs: int, random: np.random.Generator
) -> Batches:
    """Returns `epochs` passes over the split, each in its own order, without a partial batch."""
    per_epoch = len(split) // batch_size
    if per_epoch == 0:
        raise InputError(
            f"--batch-size {batch_size} is more than the {len(split)} training examples"
        )
    orders = [random.permutation(len(split))[: per_epoch * batch_size] for _ in range(epochs)]
    return Batches(split, np.concatenate(orders).reshape(-1, batch_size))


def digit_batches(
    split: Split,
    digit: int,
    *,
    batch_size: int,
    batches: int,
    replay: float,
    random: np.random.Generator,
) -> Batches:
    """Returns batches of one digit, with a fraction `replay` of rows of all other digits."""
    is_digit = split.labels == digit
    count = batches * batch_size
    others = round(count * replay)
    rows = np.concatenate(
        [
            _drawn(np.flatnonzero(is_digit), count - others, random),
            _drawn(np.flatnonzero(~is_digit), others, random),
        ]
    )
    return Batches(split, random.permutation(rows).reshape(batches, batch_size))


def _drawn(rows: NDArray[np.int64], count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Returns `count` of the rows; none is repeated before all have been taken."""
    passes = -(-count // len(rows))
    orders = [random.permutation(rows) for _ in range(passes)]
    return np.concatenate([rows[:0], *orders])[:count]
