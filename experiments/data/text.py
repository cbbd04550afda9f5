"""Sentences with a class each."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.data.dataset import Labels
from experiments.errors import InputError


@dataclass(frozen=True)
class Texts:
    """Sentences, and for each the number of its class: a place in `classes`."""

    sentences: tuple[str, ...]
    labels: Labels
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sentences)

    def counts(self) -> dict[str, int]:
        """Returns how many sentences each class has."""
        counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, counts, strict=True))


@dataclass(frozen=True)
class TextDataset:
    """Sentences to train on and others to test on, under the name by which metrics call them."""

    name: str
    train: Texts
    test: Texts

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


def subset(texts: Texts, count: int, *, seed: int) -> Texts:
    """Returns `count` of the sentences, drawn by the seed; the classes keep their shares.

    With one seed, a smaller subset is part of every larger one. The order stays that of `texts`.
    """
    return divided(texts, count, seed=seed, option="--train-examples")[0]


def divided(texts: Texts, count: int, *, seed: int, option: str) -> tuple[Texts, Texts]:
    """Returns the `subset` of so many sentences, and the others; errors name the option."""
    if count > len(texts):
        raise InputError(f"{option} {count} is more than the {len(texts)} there are")
    random = np.random.default_rng(seed)
    # Each class is spread evenly over the unit interval, so every prefix has all in proportion.
    places = np.empty(len(texts))
    for label in range(len(texts.classes)):
        rows = random.permutation(np.flatnonzero(texts.labels == label))
        places[rows] = (np.arange(len(rows)) + 0.5) / max(len(rows), 1)
    order = np.argsort(places, kind="stable")
    return _rows(texts, np.sort(order[:count])), _rows(texts, np.sort(order[count:]))


def _rows(texts: Texts, rows: NDArray[np.intp]) -> Texts:
    return Texts(tuple(texts.sentences[row] for row in rows), texts.labels[rows], texts.classes)
