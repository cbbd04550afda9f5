"""TensorFlow Datasets' MNIST, prepared and read without TensorFlow.

TFDS's own builder needs TensorFlow to unpack the four IDX files and to encode the images. The
builder here overrides just that part, so it writes the same data set, `mnist/3.0.1`, and TFDS reads
it like its own. Importing this module takes a second; a run whose images are decoded already does
not need it.
"""

import gzip
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from numpy.typing import NDArray
from PIL import Image

from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.data import prepared
from experiments.data.dataset import MNIST_COUNTS

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"
FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)

_UNSIGNED_BYTES = 0x08


class MNIST(tfds.image_classification.MNIST, skip_registration=True):  # type: ignore[call-arg]
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
    """Downloads and prepares MNIST; see `prepared.prepare_from_network`."""
    prepared.prepare_from_network(builder, builder.URL + FILES[0], console)


def examples(builder: MNIST, split: str) -> Iterator[Any]:
    """Yields the examples of a prepared split, with images that are still encoded as PNG."""
    return prepared.examples(builder, split, {"image": tfds.decode.SkipDecoding()})


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Returns the array in a gzipped IDX file of unsigned bytes.

    The file is two zero bytes, the element type, the number of axes, each axis's length as a
    big-endian 32-bit integer, then the elements.
    """
    content = gzip.decompress(path.read_bytes())
    if content[:3] != bytes([0, 0, _UNSIGNED_BYTES]):
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def check_originals(folder: Path, sha256_of: Mapping[str, str]) -> None:
    """Checks that `folder` holds the four files as they were published.

    Raises:
      InputError: a file is missing or is not the original; it is named.
    """
    fix = "Fetch it again, or leave --mnist-dir and MNIST_DIR unset to download MNIST"
    if not folder.is_dir():
        raise InputError(
            f"--mnist-dir (or MNIST_DIR) is {folder}, which is not a folder; expected the folder "
            f"that holds {', '.join(FILES)}"
        )
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing; --mnist-dir needs the four files. {fix}")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256_of[name]:
            raise InputError(
                f"{path} is damaged or another file: its SHA-256 is {found}, expected "
                f"{sha256_of[name]}. {fix}"
            )
