"""Scikit-learn's bundled handwritten digits, scaled up to MNIST's size: no download needed."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from experiments.data.dataset import IMAGE_SIDE, PIXELS, Dataset, Images, Split

NAME = "digits"

_SIDE = 8
_BRIGHTEST = 16
_TEST_COUNT = 360
# Fixed, so that every run of every seed is tested on the same images.
_SPLIT_SEED = 0


def digits() -> Dataset:
    """Returns the 1,797 real 8×8 images as 28×28: 1,437 to train on and 360 to test on."""
    # Imported late: scikit-learn takes a second, and a run on MNIST doesn't need it.
    from sklearn.datasets import load_digits

    rows, classes = load_digits(return_X_y=True)
    inputs = np.stack([_upscaled(row) for row in rows])
    labels = classes.astype(np.int32)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    test, train = order[:_TEST_COUNT], order[_TEST_COUNT:]
    return Dataset(NAME, Split(inputs[train], labels[train]), Split(inputs[test], labels[test]))


def _upscaled(row: NDArray[np.float64]) -> Images:
    pixels = np.rint(row * (255 / _BRIGHTEST)).astype(np.uint8)
    small = Image.fromarray(pixels.reshape(_SIDE, _SIDE))
    large = small.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BILINEAR)
    return np.asarray(large).reshape(PIXELS)
