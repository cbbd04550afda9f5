"""The real MNIST, where MNIST_DIR holds its four files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.data.dataset import Dataset
from experiments.data.images import load_images
from experiments.data.mnist_builder import (
    FILES,
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    read_idx,
)

pytestmark = pytest.mark.skipif(
    "MNIST_DIR" not in os.environ, reason="MNIST_DIR names no folder with MNIST's files"
)


@pytest.fixture(scope="module")
def mnist_dir() -> Path:
    return Path(os.environ["MNIST_DIR"])


@pytest.fixture(scope="module")
def prepared(mnist_dir, tmp_path_factory) -> tuple[Path, Dataset]:
    """Returns a data folder in which MNIST was prepared, and what came of it."""
    folder = tmp_path_factory.mktemp("data")
    return folder, load_images("mnist", folder, mnist_dir, Console(to_stderr=True))


def in_any_order(inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns a number for each example, sorted: TFDS shuffles what it prepares."""
    weights = np.random.default_rng(0).integers(1, 2**40, inputs.shape[1])
    return np.sort(inputs.astype(np.int64) @ weights + labels)


@pytest.mark.slow
def test_it_holds_the_published_images_and_labels(prepared, mnist_dir):
    _, dataset = prepared
    for split, images, labels in (
        (dataset.train, TRAIN_IMAGES, TRAIN_LABELS),
        (dataset.test, TEST_IMAGES, TEST_LABELS),
    ):
        published = read_idx(mnist_dir / images).reshape(-1, 784), read_idx(mnist_dir / labels)
        assert split.inputs.dtype == np.uint8
        assert np.array_equal(in_any_order(split.inputs, split.labels), in_any_order(*published))


@pytest.mark.slow
def test_it_is_prepared_and_decoded_once(prepared, monkeypatch):
    folder, dataset = prepared
    monkeypatch.delenv("MNIST_DIR")
    monkeypatch.setitem(sys.modules, "experiments.data.mnist_builder", None)
    again = load_images("mnist", folder, None, Console(to_stderr=True))
    assert np.array_equal(again.train.inputs, dataset.train.inputs)
    assert np.array_equal(again.test.labels, dataset.test.labels)


@pytest.mark.slow
def test_tensorflow_datasets_reads_what_was_prepared_without_tensorflow(prepared):
    script = (
        "import sys, tensorflow_datasets as tfds\n"
        "source = tfds.data_source('mnist', split='test', data_dir=sys.argv[1], download=False)\n"
        "assert len(source) == 10_000 and source[0]['image'].shape == (28, 28, 1)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, prepared[0]], check=True)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_original_is_named(mnist_dir, tmp_path, console, name):
    for original in FILES:
        shutil.copy(mnist_dir / original, tmp_path / original)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).chmod(0o600)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is damaged or another file"):
        load_images("mnist", tmp_path / "data", tmp_path, console)
    assert not (tmp_path / "data" / "mnist").exists()
