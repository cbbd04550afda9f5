"""A data set in memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Labels = NDArray[np.int32]

IMAGE_SIDE = 28
PIXELS = IMAGE_SIDE * IMAGE_SIDE
CLASSES = 10
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
    """A training and a test set under the name by which metrics call them."""

    name: str
    train: Split
    test: Split
