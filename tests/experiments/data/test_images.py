"""Which data set comes of which choice; nothing here touches the network."""

import urllib.error
import urllib.request

import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.data.dataset import Dataset, Split
from experiments.data.images import _from_arrays, _save_arrays, load_images


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.delenv("MNIST_DIR", raising=False)


def test_digits_are_mnist_shaped_bytes(console, tmp_path):
    dataset = load_images("digits", tmp_path, None, console)
    assert dataset.name == "digits"
    assert dataset.train.inputs.shape == (1437, 784)
    assert dataset.test.inputs.shape == (360, 784)
    assert dataset.train.inputs.dtype == np.uint8
    assert dataset.train.inputs.max() == 255
    assert set(dataset.test.labels) == set(range(10))


def test_auto_falls_back_to_digits_and_cannot_be_missed(console, tmp_path, capsys):
    assert load_images("auto", tmp_path, None, console).name == "digits"
    shown = capsys.readouterr().err
    assert "NOT MNIST" in shown
    assert "no network" in shown


def test_mnist_that_cannot_be_had_names_three_ways(console, tmp_path):
    with pytest.raises(InputError, match=r"no network.*\(1\).*\(2\) pass --mnist-dir.*\(3\)"):
        load_images("mnist", tmp_path, None, console)


@pytest.mark.parametrize("choice", ["auto", "mnist"])
def test_a_wrong_mnist_dir_is_an_error_in_every_mode(console, tmp_path, choice):
    with pytest.raises(InputError, match="--mnist-dir"):
        load_images(choice, tmp_path / "data", tmp_path / "nowhere", console)


def test_the_variable_is_heeded(console, tmp_path, monkeypatch):
    monkeypatch.setenv("MNIST_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="MNIST_DIR"):
        load_images("auto", tmp_path / "data", None, console)


def test_arrays_come_back_as_they_were_saved(tmp_path):
    split = Split(np.eye(3, dtype=np.uint8), np.arange(3, dtype=np.int32))
    path = tmp_path / "arrays.npz"
    _save_arrays(Dataset("mnist", split, split), path)
    restored = _from_arrays(path)
    assert restored is not None
    assert np.array_equal(restored.test.inputs, split.inputs)
    path.write_bytes(path.read_bytes()[:100])
    assert _from_arrays(path) is None
