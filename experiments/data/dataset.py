"""Data sets in memory: arrays with labels, and sentences with labels."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.common.errors import InputError

Labels = NDArray[np.int32]

# How many images MNIST has.
MNIST_COUNTS = {"train": 60_000, "test": 10_000}


@dataclass(frozen=True)
class Split:
    """Inputs of shape (count, features) and their labels of shape (count,)."""

    inputs: NDArray[Any]
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A training and a test set, under the name that metrics give them."""

    name: str
    train: Split
    test: Split


@dataclass(frozen=True)
class Texts:
    """Sentences, and the class of each as an index into `classes`."""

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
    """Sentences for training and for testing, under the name that metrics give them."""

    name: str
    train: Texts
    test: Texts

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


def subset(texts: Texts, count: int, *, seed: int) -> Texts:
    """Returns `count` sentences, drawn by the seed, with each class in proportion.

    With the same seed, a smaller subset is part of every larger one. The order is that of `texts`.
    """
    return divided(texts, count, seed=seed, option="--train-examples")[0]


def divided(texts: Texts, count: int, *, seed: int, option: str) -> tuple[Texts, Texts]:
    """Returns the `subset` of `count` sentences, and the others; errors name the option."""
    if count > len(texts):
        raise InputError(f"{option} {count} is more than the {len(texts)} there are")
    random = np.random.default_rng(seed)
    # Each class is spread evenly over the unit interval, so that every prefix is in proportion.
    places = np.empty(len(texts))
    for label in range(len(texts.classes)):
        rows = random.permutation(np.flatnonzero(texts.labels == label))
        places[rows] = (np.arange(len(rows)) + 0.5) / max(len(rows), 1)
    order = np.argsort(places, kind="stable")
    return _rows(texts, np.sort(order[:count])), _rows(texts, np.sort(order[count:]))


def _rows(texts: Texts, rows: NDArray[np.intp]) -> Texts:
    return Texts(tuple(texts.sentences[row] for row in rows), texts.labels[rows], texts.classes)


def default_data_dir() -> Path:
    """Returns the folder in which TensorFlow Datasets keeps data sets."""
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
