"""Images of digits in memory: MNIST, or scikit-learn's where MNIST is out of reach."""

import contextlib
import io
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.common.files import atomic_path
from experiments.data.dataset import MNIST_COUNTS, Dataset, Split, default_data_dir

Images = NDArray[np.uint8]
Choice = Literal["auto", "mnist", "digits"]
CHOICES: tuple[Choice, ...] = ("auto", "mnist", "digits")

IMAGE_SIDE = 28
PIXELS = IMAGE_SIDE * IMAGE_SIDE
CLASSES = 10

_THREE_WAYS = (
    "get it in one of three ways: (1) run where there is a network, and it is downloaded once; "
    "(2) pass --mnist-dir DIR, or set MNIST_DIR, to a folder with the four original IDX .gz files; "
    "(3) pass --data-dir DIR, a folder in which TensorFlow Datasets has prepared mnist"
)
_SMALL_SIDE = 8
_BRIGHTEST = 16
_TEST_COUNT = 360
# Fixed, so that every run with every seed is tested on the same images.
_SPLIT_SEED = 0


def load_images(
    choice: Choice, data_dir: Path | None, mnist_dir: Path | None, console: Console
) -> Dataset:
    """Returns the data set of this choice, its images as uint8.

    Args:
      choice: `"mnist"`, `"digits"`, or `"auto"`: MNIST if it is available, digits otherwise.
      data_dir: where prepared data sets are; TFDS's own folder if None.
      mnist_dir: a folder with MNIST's four IDX files; that of the variable MNIST_DIR if None.
      console: where progress is shown.
    """
    if choice == "digits":
        return digits()
    try:
        return mnist(data_dir or default_data_dir(), mnist_dir or _given_mnist_dir(), console)
    except OSError as error:
        if choice == "mnist":
            raise InputError(f"MNIST is not available ({error}); {_THREE_WAYS}") from error
        console.warn(
            "NOT MNIST: using scikit-learn's 1,797 handwritten digits instead",
            f"MNIST is not available here ({error}); to change that, {_THREE_WAYS}.",
        )
        return digits()


def _given_mnist_dir() -> Path | None:
    value = os.environ.get("MNIST_DIR")
    return Path(value) if value else None


def mnist(data_dir: Path, mnist_dir: Path | None, console: Console) -> Dataset:
    """Returns MNIST as TFDS has prepared it in `data_dir`, or prepares it there first.

    The images are decoded once; later runs load the arrays, which takes a tenth of a second.

    Args:
      data_dir: where prepared data sets are.
      mnist_dir: a folder with the four IDX files to prepare it from; the network if None.
      console: where progress is shown.

    Raises:
      InputError: the files are not MNIST, or a folder can't be used.
      OSError: MNIST can't be downloaded.
    """
    arrays = data_dir / "mnist_uint8.npz"
    if (decoded := _from_arrays(arrays)) is not None:
        return decoded
    from experiments.data import mnist_builder
    from experiments.data.prepared import is_prepared

    builder = mnist_builder.mnist_builder(data_dir)
    if not is_prepared(builder):
        if mnist_dir is None:
            mnist_builder.prepare_from_network(builder, console)
        else:
            mnist_builder.prepare_from_files(builder, mnist_dir, console)
    dataset = Dataset(
        "mnist",
        train=_decoded(mnist_builder.examples(builder, "train"), "train", console),
        test=_decoded(mnist_builder.examples(builder, "test"), "test", console),
    )
    # A shared, read-only data folder is fine: the images are then decoded in every run.
    with contextlib.suppress(OSError):
        _save_arrays(dataset, arrays)
    return dataset


def _decoded(examples: Iterable[Any], split: str, console: Console) -> Split:
    """Returns examples whose images are PNG as arrays."""
    count = MNIST_COUNTS[split]
    inputs = np.empty((count, PIXELS), np.uint8)
    labels = np.empty(count, np.int32)
    with console.progress(f"Decoding MNIST, {split}", count) as progress:
        for index, example in enumerate(examples):
            inputs[index] = np.asarray(Image.open(io.BytesIO(example["image"]))).ravel()
            labels[index] = example["label"]
            progress.advance()
    return Split(inputs, labels)


def _from_arrays(path: Path) -> Dataset | None:
    """Returns the images that an earlier run decoded, if the file is there and whole."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            train = Split(arrays["train_inputs"], arrays["train_labels"])
            test = Split(arrays["test_inputs"], arrays["test_labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Dataset("mnist", train, test)


def _save_arrays(dataset: Dataset, path: Path) -> None:
    with atomic_path(path) as temporary:
        np.savez(
            temporary,
            train_inputs=dataset.train.inputs,
            train_labels=dataset.train.labels,
            test_inputs=dataset.test.inputs,
            test_labels=dataset.test.labels,
        )


def digits() -> Dataset:
    """Returns scikit-learn's 1,797 images of 8×8 pixels as 28×28: 1,437 train, 360 test."""
    # Imported late: scikit-learn takes a second, and a run on MNIST doesn't need it.
    from sklearn.datasets import load_digits

    rows, classes = load_digits(return_X_y=True)
    inputs = np.stack([_upscaled(row) for row in rows])
    labels = classes.astype(np.int32)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    test, train = order[:_TEST_COUNT], order[_TEST_COUNT:]
    return Dataset("digits", Split(inputs[train], labels[train]), Split(inputs[test], labels[test]))


def _upscaled(row: NDArray[np.float64]) -> Images:
    pixels = np.rint(row * (255 / _BRIGHTEST)).astype(np.uint8)
    small = Image.fromarray(pixels.reshape(_SMALL_SIDE, _SMALL_SIDE))
    large = small.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BILINEAR)
    return np.asarray(large).reshape(PIXELS)
