"""Data sets as TensorFlow Datasets keeps them."""

import logging

from experiments.data.mnist_builder import mnist_builder
from experiments.data.prepared import is_prepared


def test_a_data_set_that_is_yet_to_be_prepared_is_met_without_a_warning(tmp_path, capfd, caplog):
    # The folder is there as soon as a first preparation began, or was interrupted.
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    assert not is_prepared(mnist_builder(tmp_path))
    assert (capfd.readouterr().err, caplog.records) == ("", [])
    assert logging.getLogger("absl").level < logging.ERROR
