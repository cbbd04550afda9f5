"""TensorFlow Datasets' MNIST, prepared and read without TensorFlow.

TFDS's own builder needs TensorFlow to unpack the four files and to encode the images. The builder
here overrides just that part, so it writes the same data set, `mnist/3.0.1`, which TFDS reads like
any that it prepared itself. Importing this module takes a second; a run that has its images in
memory already doesn't need it.
"""

import contextlib
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from experiments.console import Console
from experiments.data.dataset import MNIST_COUNTS
from experiments.data.idx import FILES, check_originals, read_idx
from experiments.data.tfrecord import tfrecords
from experiments.errors import InputError

_PROBE_SECONDS = 5


class MNIST(tfds.image_classification.MNIST, skip_registration=True):
    """TFDS's MNIST, generated with NumPy and Pillow."""

    name = tfds.image_classification.MNIST.name
    VERSION = tfds.image_classification.MNIST.VERSION
    url_infos = tfds.image_classification.MNIST.url_infos

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> Any:
        paths = dl_manager.download({name: self.URL + name for name in FILES})
        train_images, train_labels, test_images, test_labels = (paths[name] for name in FILES)
        return {
            "train": self._generate_examples(MNIST_COUNTS["train"], train_images, train_labels),
            "test": self._generate_examples(MNIST_COUNTS["test"], test_images, test_labels),
        }

    def _generate_examples(self, num_examples: int, data_path: Any, label_path: Any) -> Any:
        images, labels = read_idx(data_path), read_idx(label_path)
        for index in range(num_examples):
            yield index, {"image": Image.fromarray(images[index]), "label": int(labels[index])}


def mnist_builder(data_dir: Path) -> MNIST:
    """Returns the builder of `mnist` in this folder, prepared or not."""
    as_prepared = MNIST(data_dir=data_dir)
    if as_prepared.is_prepared():
        return as_prepared
    return MNIST(data_dir=data_dir, file_format="array_record")


def prepare_from_files(builder: MNIST, mnist_dir: Path, console: Console) -> None:
    """Prepares MNIST from the four IDX files, without a network."""
    originals: Any = builder.url_infos
    registered = {url.rsplit("/", 1)[-1]: info.checksum for url, info in originals.items()}
    check_originals(mnist_dir, registered)
    _prepare(builder, mnist_dir, f"the files in {mnist_dir}", console)


def prepare_from_network(builder: MNIST, console: Console) -> None:
    """Downloads and prepares MNIST; raises OSError within seconds where there is no network."""
    # TFDS itself waits without a limit for a server that doesn't answer.
    probe = urllib.request.Request(builder.URL + FILES[0], method="HEAD")
    urllib.request.urlopen(probe, timeout=_PROBE_SECONDS).close()
    try:
        _prepare(builder, None, builder.URL, console)
    except (tfds.download.DownloadError, NonMatchingChecksumError) as error:
        raise OSError(f"the download failed: {error}") from error


def examples(builder: MNIST, split: str) -> Iterator[Any]:
    """Yields the examples of a prepared split, their images still encoded as PNG."""
    prepared: Any = tfds.builder_from_directory(builder.data_dir)
    encoded = {"image": tfds.decode.SkipDecoding()}
    if prepared.info.file_format is tfds.core.FileFormat.TFRECORD:
        for path in prepared.info.splits[split].filepaths:
            for record in tfrecords(Path(path)):
                yield prepared.info.features.deserialize_example_np(record, decoders=encoded)
    else:
        yield from prepared.as_data_source(split, decoders=encoded)


def _prepare(builder: MNIST, manual_dir: Path | None, source: str, console: Console) -> None:
    console.note(f"Preparing MNIST, once, from {source} in {builder.data_dir}")
    if not console.is_terminal:
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    # TFDS prints what it does; standard output belongs to the study's results.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            builder.download_and_prepare(download_config=config)
        except PermissionError as error:
            raise InputError(
                f"--data-dir {builder.data_dir} can't be written ({error}); pass another folder"
            ) from error
