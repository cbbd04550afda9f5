"""TensorFlow Datasets' MNIST, prepared and read without TensorFlow.

TFDS's own builder needs TensorFlow to unpack the four files and to encode the images. The builder
here overrides just that part, so it writes the same data set, `mnist/3.0.1`, which TFDS reads like
any that it prepared itself. Importing this module takes a second; a run that has its images in
memory already doesn't need it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from experiments.console import Console
from experiments.data import prepared
from experiments.data.dataset import MNIST_COUNTS
from experiments.data.idx import FILES, check_originals, read_idx


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
    return prepared.builder_in(MNIST, data_dir)


def prepare_from_files(builder: MNIST, mnist_dir: Path, console: Console) -> None:
    """Prepares MNIST from the four IDX files, without a network."""
    originals: Any = builder.url_infos
    registered = {url.rsplit("/", 1)[-1]: info.checksum for url, info in originals.items()}
    check_originals(mnist_dir, registered)
    prepared.prepare(builder, mnist_dir, f"the files in {mnist_dir}", console)


def prepare_from_network(builder: MNIST, console: Console) -> None:
    """Downloads and prepares MNIST; raises OSError within seconds where there is no network."""
    prepared.prepare_from_network(builder, builder.URL + FILES[0], console)


def examples(builder: MNIST, split: str) -> Iterator[Any]:
    """Yields the examples of a prepared split, their images still encoded as PNG."""
    return prepared.examples(builder, split, {"image": tfds.decode.SkipDecoding()})
