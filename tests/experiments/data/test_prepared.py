"""Data sets as TensorFlow Datasets keeps them."""

import logging
import struct

import pytest

from experiments.data.mnist_builder import mnist_builder
from experiments.data.prepared import is_prepared, tfrecords


def test_a_data_set_that_is_yet_to_be_prepared_is_met_without_a_warning(tmp_path, capfd, caplog):
    # The folder is there as soon as a first preparation began, or was interrupted.
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    assert not is_prepared(mnist_builder(tmp_path))
    assert (capfd.readouterr().err, caplog.records) == ("", [])
    assert logging.getLogger("absl").level < logging.ERROR


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
