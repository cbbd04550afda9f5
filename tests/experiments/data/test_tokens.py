"""Batches by length: every sentence once, few shapes, and an order that can be taken up again."""

import json
from dataclasses import asdict

import jax
import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.data.tokens import (
    Position,
    TokenizedTexts,
    TrainingBatches,
    evaluation_batches,
    in_order,
    lengths_up_to,
    padding_share,
)

LENGTHS = (4, 8, 16)


def texts_of(token_counts) -> TokenizedTexts:
    """Returns texts in which every token of a sentence is the sentence's number, plus one."""
    token_ids = tuple(
        np.full(count, number + 1, np.int32) for number, count in enumerate(token_counts)
    )
    return TokenizedTexts(token_ids, np.arange(len(token_ids), dtype=np.int32) % 3, padding_id=0)


@pytest.fixture
def texts() -> TokenizedTexts:
    return texts_of(np.random.default_rng(0).integers(1, 17, 75))


def training(texts, *, batch_size=8, epochs=2, seed=0, lengths=LENGTHS) -> TrainingBatches:
    return TrainingBatches(texts, batch_size=batch_size, epochs=epochs, seed=seed, lengths=lengths)


def rows_in(batches):
    return np.concatenate([batch.rows for batch in batches]).tolist()


def check_contents(batch, texts):
    """Asserts that every row of the batch is what the texts have there."""
    for place, row in enumerate(batch.rows):
        if row < 0:
            assert batch.weights[place] == 0
            assert not batch.mask[place].any()
            continue
        ids = texts.token_ids[row]
        assert batch.token_ids[place, : len(ids)].tolist() == ids.tolist()
        assert not batch.token_ids[place, len(ids) :].any()
        assert batch.mask[place].sum() == len(ids)
        assert batch.mask[place, : len(ids)].all()
        assert batch.labels[place] == texts.labels[row]
        assert batch.weights[place] == 1


def test_batches_hold_sentences_and_their_labels(texts):
    for batch in [*training(texts), *evaluation_batches(texts, batch_size=8, lengths=LENGTHS)]:
        check_contents(batch, texts)


def test_dtypes_and_shapes_are_those_of_a_compiled_step(texts):
    batches = list(training(texts))
    dtypes = {tuple(str(leaf.dtype) for leaf in batch) for batch in batches}
    assert dtypes == {("int32", "bool", "int32", "float32", "int32")}
    assert {batch.token_ids.shape for batch in batches} <= {(8, length) for length in LENGTHS}
    assert len(jax.tree.leaves(batches[0])) == 5


def test_an_epoch_shows_every_sentence_at_most_once_and_leaves_out_the_few_that_are_over(texts):
    batches = list(training(texts))
    assert len(batches) == len(training(texts)) == 2 * 9
    first, second = rows_in(batches[:9]), rows_in(batches[9:])
    assert len(set(first)) == len(set(second)) == 72
    assert first != second


def test_no_sentence_is_always_left_out():
    texts = texts_of([3] * 8 + [16])
    seen = set(rows_in(training(texts, batch_size=8, epochs=60)))
    assert seen == set(range(9))


def test_a_sentence_is_filled_up_no_further_than_to_fill_its_batch():
    texts = texts_of([4] * 8 + [5] * 7 + [2])
    shapes = training(texts, batch_size=8, epochs=1).shapes()
    assert shapes == {4: 1, 8: 1}
    assert training(texts_of([4] * 9 + [2] * 3), batch_size=4).shapes() == {4: 3}


def test_shapes_are_those_of_the_batches(texts):
    batches = training(texts, epochs=1)
    found = [batch.token_ids.shape[1] for batch in batches]
    assert batches.shapes() == {length: found.count(length) for length in sorted(set(found))}


def test_lengths_alternate_within_an_epoch(texts):
    lengths = [batch.token_ids.shape[1] for batch in training(texts, epochs=1)]
    assert lengths != sorted(lengths)


def test_the_seed_decides_the_order(texts):
    assert rows_in(training(texts)) == rows_in(training(texts))
    assert rows_in(training(texts)) != rows_in(training(texts, seed=1))


@pytest.mark.parametrize("done", [0, 1, 8, 9, 13, 18])
def test_training_goes_on_where_it_was_left(texts, done):
    whole = list(training(texts))
    stored = json.dumps(asdict(training(texts).position(done)))
    rest = list(training(texts).starting_at(Position(**json.loads(stored))))
    assert len(rest) == len(whole) - done
    for batch, expected in zip(rest, whole[done:], strict=True):
        assert all(map(np.array_equal, batch, expected))


def test_a_position_of_another_run_is_refused(texts):
    with pytest.raises(InputError, match="--seed is 0, but training began with 1"):
        training(texts).starting_at(Position(seed=1, epoch=0, index=0))
    with pytest.raises(InputError, match=r"batch 9 of an epoch.* --batch-size 8 .* has 9"):
        training(texts).starting_at(Position(seed=0, epoch=0, index=9))


def test_a_batch_larger_than_the_data_is_refused(texts):
    with pytest.raises(InputError, match=r"--batch-size 76 .* 75 training examples"):
        training(texts, batch_size=76)


def test_testing_shows_every_sentence_once_in_batches_of_one_size(texts):
    batches = evaluation_batches(texts, batch_size=8, lengths=LENGTHS)
    rows = rows_in(batches)
    assert sorted(row for row in rows if row >= 0) == list(range(75))
    assert rows.count(-1) == 80 - 75
    assert {len(batch.rows) for batch in batches} == {8}
    assert sum(batch.weights.sum() for batch in batches) == 75


def test_what_came_of_each_sentence_is_put_in_order(texts):
    batches = evaluation_batches(texts, batch_size=8, lengths=LENGTHS)
    outputs = [batch.token_ids[:, :1] for batch in batches]
    assert in_order(batches, outputs).ravel().tolist() == list(range(1, 76))


def test_a_sentence_too_long_for_every_length_is_refused(texts):
    with pytest.raises(ValueError, match="16 tokens, more than 8"):
        evaluation_batches(texts, batch_size=8, lengths=(4, 8))


def test_lengths_double_up_to_the_longest():
    assert lengths_up_to(64) == (8, 16, 32, 64)
    assert lengths_up_to(50) == (8, 16, 32, 50)
    assert lengths_up_to(5) == (5,)


def test_padding_is_counted():
    batches = evaluation_batches(texts_of([4, 2]), batch_size=2, lengths=(4,))
    assert padding_share(batches) == 0.25
