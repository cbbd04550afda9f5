"""MNIST in memory, from the first place that has it."""

import contextlib
import io
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.console import Console
from experiments.data.dataset import MNIST_COUNTS, PIXELS, Dataset, Split
from experiments.output import atomic_path

NAME = "mnist"


def default_data_dir() -> Path:
    """Returns the folder in which TFDS keeps its data sets."""
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def mnist(data_dir: Path, mnist_dir: Path | None, console: Console) -> Dataset:
    """Returns MNIST as TFDS has prepared it in `data_dir`, or prepares it there first.

    The images are decoded once; later runs load the arrays, which takes a tenth of a second.

    Args:
      data_dir: where prepared data sets are.
      mnist_dir: a folder with the four IDX files to prepare from; the network unless given.
      console: what takes time is told here.

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
        NAME,
        train=_decoded(mnist_builder.examples(builder, "train"), "train", console),
        test=_decoded(mnist_builder.examples(builder, "test"), "test", console),
    )
    # A shared, read-only data folder is fine: its images are then decoded in every run.
    with contextlib.suppress(OSError):
        _save_arrays(dataset, arrays)
    return dataset


def _decoded(examples: Iterable[Any], split: str, console: Console) -> Split:
    """Returns the examples, their images PNG, as arrays."""
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
    """Returns what an earlier run decoded, if it is there and whole."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            train = Split(arrays["train_inputs"], arrays["train_labels"])
            test = Split(arrays["test_inputs"], arrays["test_labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Dataset(NAME, train, test)


def _save_arrays(dataset: Dataset, path: Path) -> None:
    with atomic_path(path) as temporary:
        np.savez(
            temporary,
            train_inputs=dataset.train.inputs,
            train_labels=dataset.train.labels,
            test_inputs=dataset.test.inputs,
            test_labels=dataset.test.labels,
        )
