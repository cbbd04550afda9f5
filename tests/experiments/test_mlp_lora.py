"""The smaller study: full training and adapters through one train function."""

import json

import numpy as np
import pytest

from experiments.mlp_lora import main, random_data

SMALL = ("--epochs", "2", "--json")


@pytest.fixture(scope="module")
def run_twice():
    """Returns the metrics of two runs of the same seed, and what the first one showed."""
    import contextlib
    import io

    results, shown = [], io.StringIO()
    for _ in range(2):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(shown):
            assert main(list(SMALL)) == 0
        results.append(json.loads(printed.getvalue()))
    return *results, shown.getvalue()


def test_both_trainings_learn_and_adapters_train_far_fewer_numbers(run_twice):
    metrics = run_twice[0]
    assert metrics["accuracy"]["full"] > 0.9
    assert metrics["accuracy"]["lora"] > 0.9
    assert metrics["trainable"]["full"] == 20 * 1000 + 1000 + 1000 * 1000 + 1000 + 1000 * 2 + 2
    assert metrics["trainable"]["lora"] == 8 * (20 + 1000) + 8 * (1000 + 1000) + 1000 * 2 + 2


def test_it_tells_what_trains_and_how(run_twice):
    shown = run_twice[2]
    for path, label in (
        ("hidden_1/kernel/lora_A", "lora_A"),
        ("hidden_2/kernel/base", "frozen"),
        ("output/kernel/value", "full"),
    ):
        line = next(line for line in shown.splitlines() if path in line)
        assert label in line.removeprefix(path)


def test_the_same_seed_gives_the_same_numbers(run_twice):
    assert run_twice[0] == run_twice[1]


def test_the_classes_are_balanced_and_the_test_rows_are_others():
    dataset = random_data(np.random.default_rng(0))
    assert 0.45 < dataset.train.labels.mean() < 0.55
    assert len(dataset.test) == 1000
    assert not np.isin(dataset.test.inputs[:, 0], dataset.train.inputs[:, 0]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "argument --rank"),
        (["--rank", "21"], "hidden_1/kernel"),
        (["--targets", "hiden_1"], "hidden_1"),
        (["--train", "outptu"], "output"),
        (["--epochs", "0"], "argument --epochs"),
        (["--batch-size", "5000"], "--batch-size 5000"),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments, message, error_of):
    assert message in error_of(main, arguments)
