"""The IDX files in which MNIST is published, and the check that they are the originals."""

import gzip
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.errors import InputError

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"
FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)

_UNSIGNED_BYTES = 0x08


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
    """Raises, naming the file, unless `folder` holds the four files as they were published."""
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
