"""Batches hold the rows that they should, in an order that the seed alone decides."""

import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.data.batches import digit_batches, epoch_batches
from experiments.data.dataset import Split


def split_of(count: int) -> Split:
    """Returns rows that hold their own number, with the ten classes in turn."""
    return Split(np.arange(count).reshape(count, 1), np.arange(count, dtype=np.int32) % 10)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rows_in(batches) -> np.ndarray:
    return np.concatenate([inputs.ravel() for inputs, _ in batches])


def test_an_epoch_shows_every_row_once():
    batches = epoch_batches(split_of(60), batch_size=10, epochs=1, random=random())
    assert len(batches) == 6
    assert sorted(rows_in(batches)) == list(range(60))


def test_epochs_differ_in_order_and_leave_out_the_partial_batch():
    batches = epoch_batches(split_of(25), batch_size=10, epochs=3, random=random())
    rows = rows_in(batches).reshape(3, 20)
    assert len(batches) == 6
    assert all(len(set(epoch)) == 20 for epoch in rows)
    assert not np.array_equal(rows[0], rows[1])


def test_labels_stay_with_their_inputs():
    batches = epoch_batches(split_of(60), batch_size=10, epochs=1, random=random())
    assert all(np.array_equal(inputs.ravel() % 10, labels) for inputs, labels in batches)


def test_the_same_seed_gives_the_same_batches():
    first, second, other = (
        rows_in(epoch_batches(split_of(60), batch_size=10, epochs=1, random=random(seed)))
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(InputError, match=r"--batch-size 61 .* 60 training examples"):
        epoch_batches(split_of(60), batch_size=61, epochs=1, random=random())


def test_digit_batches_hold_that_digit_alone():
    batches = digit_batches(split_of(200), 7, batch_size=5, batches=3, replay=0.0, random=random())
    assert len(batches) == 3
    assert all((labels == 7).all() and len(labels) == 5 for _, labels in batches)


@pytest.mark.parametrize(("replay", "others"), [(0.25, 10), (0.5, 20), (1.0, 40)])
def test_replay_mixes_in_that_fraction_of_other_digits(replay, others):
    batches = digit_batches(
        split_of(400), 7, batch_size=10, batches=4, replay=replay, random=random()
    )
    labels = np.concatenate([labels for _, labels in batches])
    assert (labels != 7).sum() == others


def test_more_digit_batches_than_images_begin_again():
    batches = digit_batches(split_of(100), 7, batch_size=5, batches=4, replay=0.0, random=random())
    assert np.unique(rows_in(batches), return_counts=True)[1].tolist() == [2] * 10
