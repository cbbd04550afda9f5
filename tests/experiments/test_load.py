"""Which data set comes of which choice; nothing here touches the network."""

import struct
import urllib.error
import urllib.request

import numpy as np
import pytest

from experiments.data import Dataset, Split, load
from experiments.data.mnist import _from_arrays, _save_arrays
from experiments.data.tfrecord import tfrecords
from experiments.errors import InputError


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.delenv("MNIST_DIR", raising=False)


def test_digits_are_mnist_shaped_bytes(console, tmp_path):
    dataset = load("digits", tmp_path, None, console)
    assert dataset.name == "digits"
    assert dataset.train.inputs.shape == (1437, 784)
    assert dataset.test.inputs.shape == (360, 784)
    assert dataset.train.inputs.dtype == np.uint8
    assert dataset.train.inputs.max() == 255
    assert set(dataset.test.labels) == set(range(10))


def test_auto_falls_back_to_digits_and_cannot_be_missed(console, tmp_path, capsys):
    assert load("auto", tmp_path, None, console).name == "digits"
    shown = capsys.readouterr().err
    assert "NOT MNIST" in shown
    assert "no network" in shown


def test_mnist_that_cannot_be_had_names_three_ways(console, tmp_path):
    with pytest.raises(InputError, match=r"no network.*\(1\).*\(2\) pass --mnist-dir.*\(3\)"):
        load("mnist", tmp_path, None, console)


@pytest.mark.parametrize("choice", ["auto", "mnist"])
def test_a_wrong_mnist_dir_is_an_error_in_every_mode(console, tmp_path, choice):
    with pytest.raises(InputError, match="--mnist-dir"):
        load(choice, tmp_path / "data", tmp_path / "nowhere", console)


def test_the_variable_is_heeded(console, tmp_path, monkeypatch):
    monkeypatch.setenv("MNIST_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="MNIST_DIR"):
        load("auto", tmp_path / "data", None, console)


def test_arrays_come_back_as_they_were_saved(tmp_path):
    split = Split(np.eye(3, dtype=np.uint8), np.arange(3, dtype=np.int32))
    path = tmp_path / "arrays.npz"
    _save_arrays(Dataset("mnist", split, split), path)
    restored = _from_arrays(path)
    assert restored is not None
    assert np.array_equal(restored.test.inputs, split.inputs)
    path.write_bytes(path.read_bytes()[:100])
    assert _from_arrays(path) is None


def test_tfrecords_are_read_and_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "file.tfrecord"
    records = [b"first", b"", b"third record"]
    path.write_bytes(
        b"".join(struct.pack("<QI", len(record), 0) + record + bytes(4) for record in records)
    )
    assert list(tfrecords(path)) == records
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(ValueError, match="ends in the middle"):
        list(tfrecords(path))
