"""Accuracy and wrong answers by class."""

import numpy as np

from experiments.common.evaluation import Evaluation, evaluate
from experiments.data.dataset import Split


def test_wrong_answers_are_counted_under_the_right_class():
    evaluation = Evaluation(
        predictions=np.array([0, 1, 2, 0, 0]), labels=np.array([0, 1, 1, 2, 2]), loss=0.0
    )
    assert evaluation.accuracy == 2 / 5
    assert evaluation.wrong_counts(4) == [0, 1, 2, 0]


def test_a_last_batch_that_is_not_full_is_counted(console):
    def says_its_input(variables, inputs):
        return inputs + variables["params"]

    labels = np.arange(1234, dtype=np.int32) % 3
    inputs = np.eye(3, dtype=np.float32)[labels]
    inputs[1200:] = 0  # equal logits: class 0
    result = evaluate(
        says_its_input, np.float32(0), Split(inputs, labels), console=console, description="Test"
    )
    assert len(result.predictions) == 1234
    assert sum(result.wrong_counts(3)) == (labels[1200:] != 0).sum()
    assert 0 < result.loss < np.log(3)
