"""Where the images come from: the first source that is at hand."""

import os
from pathlib import Path
from typing import Literal

from experiments.console import Console
from experiments.data.dataset import Dataset
from experiments.data.digits import digits
from experiments.data.mnist import default_data_dir, mnist
from experiments.errors import InputError

Choice = Literal["auto", "mnist", "digits"]
CHOICES: tuple[Choice, ...] = ("auto", "mnist", "digits")

_THREE_WAYS = (
    "get it in one of three ways: (1) run where there is a network, and it is downloaded once; "
    "(2) pass --mnist-dir DIR, or set MNIST_DIR, to a folder with the four original IDX .gz files; "
    "(3) pass --data-dir DIR, a folder in which TensorFlow Datasets has prepared mnist"
)


def load(
    choice: Choice, data_dir: Path | None, mnist_dir: Path | None, console: Console
) -> Dataset:
    """Returns the data set of this choice, all of it in memory as uint8.

    Args:
      choice: `"mnist"`, `"digits"`, or `"auto"`: MNIST if it can be had, digits otherwise.
      data_dir: where prepared data sets are; TFDS's own folder unless given.
      mnist_dir: a folder with MNIST's four IDX files; the variable MNIST_DIR unless given.
      console: what is being done is told here.
    """
    if choice == "digits":
        return digits()
    try:
        return mnist(data_dir or default_data_dir(), mnist_dir or _variable(), console)
    except OSError as error:
        if choice == "mnist":
            raise InputError(f"MNIST can't be had ({error}); {_THREE_WAYS}") from error
        console.warn(
            "NOT MNIST: using scikit-learn's 1,797 handwritten digits instead",
            f"MNIST can't be had here ({error}); to change that, {_THREE_WAYS}.",
        )
        return digits()


def _variable() -> Path | None:
    value = os.environ.get("MNIST_DIR")
    return Path(value) if value else None
