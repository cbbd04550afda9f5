"""Packed rows: which examples are in which row, and what a batch says of them."""

import dataclasses

import numpy as np
import pytest

from experiments.llm.packing import Row, TrainingSteps, batch_of, packed_rows
from experiments.llm.texts import TokenizedExample


def example(length, first=0, prompt=2):
    learned = np.arange(length) >= prompt
    return TokenizedExample(np.arange(first, first + length, dtype=np.int32), learned)


def test_rows_hold_every_example_once_and_have_no_room_for_another():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 33, 200).tolist()
    rows = packed_rows(lengths, random.permutation(200).tolist(), 32)
    assert sorted(number for row in rows for number in row.numbers) == list(range(200))
    used = [sum(lengths[number] for number in row.numbers) for row in rows]
    assert max(used) <= 32
    # No two rows could have been one.
    first, second, *_ = sorted(used)
    assert first + second > 32
    assert len(rows) <= 1.1 * sum(lengths) / 32


def test_what_a_batch_says():
    examples = [example(5, 10), example(4, 20, prompt=0), example(3, 30)]
    batch = batch_of(examples, [Row((0, 1)), Row((2,)), Row(())], length=10, room=9)
    assert batch.tokens[0].tolist() == [10, 11, 12, 13, 14, 20, 21, 22, 23, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0]
    assert batch.segments.tolist()[:2] == [[1] * 5 + [2] * 4 + [0], [1] * 3 + [0] * 7]
    assert not batch.segments[2].any()
    # After each of these places a token is learned; the first of an example never is.
    assert batch.places.tolist() == [[1, 2, 3, 5, 6, 7, 11, 0, 0]]
    assert batch.targets.tolist() == [[12, 13, 14, 21, 22, 23, 32, 0, 0]]
    assert batch.weights.tolist() == [[1] * 7 + [0] * 2]
    assert batch.owners.tolist() == [[0] * 3 + [1] * 3 + [2] + [0] * 2]
    flat = batch.tokens.reshape(-1)
    assert (flat[batch.places[0, :7] + 1] == batch.targets[0, :7]).all()
    with pytest.raises(ValueError, match="`room` is 3; expected at least 6"):
        batch_of(examples, [Row((0, 1)), Row((2,))], length=10, room=3)


def test_an_encoder_has_rows_of_its_own():
    sources = [np.arange(100, 106, dtype=np.int32), np.arange(200, 203, dtype=np.int32)]
    examples = [
        dataclasses.replace(each, source=source)
        for each, source in zip((example(4, 10), example(3, 20)), sources, strict=True)
    ]
    batch = batch_of(examples, [Row((1, 0)), Row(())], length=8, room=4, source_length=10)
    assert batch.tokens[0].tolist() == [20, 21, 22, 10, 11, 12, 13, 0]
    assert batch.source.tokens[0].tolist() == [200, 201, 202, *range(100, 106), 0]
    assert batch.source.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0]
    assert batch.source.segments[0].tolist() == [1] * 3 + [2] * 6 + [0]
    assert not batch.source.segments[1].any()
    assert batch.places.tolist() == [[1, 4, 5, 0]]
    assert batch.targets.tolist() == [[22, 12, 13, 0]]
    assert (batch.lengths, batch.seen) == ((10, 8), 16)


@pytest.mark.parametrize("pack", [True, False])
def test_rows_of_answers_have_room_for_the_longest(pack):
    random = np.random.default_rng(0)
    examples = [
        dataclasses.replace(each, source=np.ones(random.integers(1, 150), np.int32))
        for each in random_examples()
    ]
    steps = TrainingSteps(examples, rows=4, length=160, epochs=1, seed=0, pack=pack)
    for step in steps:
        assert step.source.tokens.shape[1:] == (4, step.lengths[0])
        assert step.lengths[1] <= min(step.lengths[0], 128)
        assert step.lengths[1] % 64 == 0
    assert sum(int(step.seen) for step in steps) == sum(
        len(each.tokens) + len(each.source) for each in examples
    )
    assert len({step.lengths for step in steps}) == len({step.lengths[0] for step in steps})
    assert 0 < steps.fullness <= 1
    without = [dataclasses.replace(each, source=each.source[:-1]) for each in examples]
    assert steps.digest != TrainingSteps(without, rows=4, length=160, epochs=1, seed=0).digest


def test_each_group_of_rows_has_its_own_places():
    examples = [example(5, 10), example(4, 20, prompt=0), example(3, 30), example(6, 40)]
    rows = [Row((0,)), Row((2,)), Row((1,)), Row((3,))]
    whole = batch_of(examples, rows, length=8, room=14)
    halves = batch_of(examples, rows, length=8, room=7, groups=2)
    np.testing.assert_array_equal(halves.tokens, whole.tokens)
    assert halves.places.tolist() == [[1, 2, 3, 9, 0, 0, 0], [0, 1, 2, 9, 10, 11, 12]]
    assert halves.owners.tolist() == [[0, 0, 0, 1, 0, 0, 0], [2, 2, 2, 3, 3, 3, 3]]
    learned = halves.weights > 0
    tokens = halves.tokens.reshape(2, -1)
    after = np.take_along_axis(tokens, halves.places + 1, axis=1)
    assert (after == halves.targets)[learned].all()
    assert halves.targets[learned].tolist() == whole.targets[whole.weights > 0].tolist()
    with pytest.raises(ValueError, match="`room` is 6; expected at least 7"):
        batch_of(examples, rows, length=8, room=6, groups=2)


@pytest.mark.parametrize("pack", [True, False])
def test_groups_have_the_places_of_all_rows(pack):
    options = {"rows": 4, "length": 32, "epochs": 1, "seed": 0, "pack": pack}
    whole, halves = (TrainingSteps(random_examples(), groups=n, **options) for n in (1, 2))
    for one, two in zip(whole, halves, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        found = [step.targets[step.weights > 0] for step in (one, two)]
        np.testing.assert_array_equal(*found)
        assert two.places.shape[1] == 2


def random_examples(count=50, longest=30):
    random = np.random.default_rng(0)
    return [example(int(n), 100 * k) for k, n in enumerate(random.integers(3, longest, count))]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_has_every_example(pack, accumulate):
    examples = random_examples(longest=200 if not pack else 30)
    length = max(map(len, examples)) + 10
    options = {"rows": 4, "length": length, "epochs": 2, "accumulate": accumulate, "pack": pack}
    steps = TrainingSteps(examples, seed=0, **options)
    learned = sum(float(step.weights.sum()) for step in steps)
    assert learned == 2 * sum(len(each) - 2 for each in examples)
    assert {step.tokens.shape[:2] for step in steps} == {(accumulate, 4)}
    lengths = {step.tokens.shape[-1] for step in steps}
    assert lengths <= ({length} if pack else {64, 128, 192, length})
    assert {batch.lengths for batch in steps.first_of_each_length()} == {(n,) for n in lengths}
    # One program for each length.
    assert len({(step.tokens.shape, step.places.shape) for step in steps}) == len(lengths)
    assert steps.fullness > (0.7 if pack else 0.35)


def test_the_seed_decides_the_order():
    options = {"rows": 4, "length": 32, "epochs": 2}
    first, again, other = (
        TrainingSteps(random_examples(), seed=seed, **options) for seed in (0, 0, 1)
    )
    for number in range(len(first)):
        for one, its_other in zip(first[number], again[number], strict=True):
            np.testing.assert_array_equal(one, its_other)
    assert (first[0].tokens != other[0].tokens).any()
    assert first.digest == other.digest
    assert first.digest != TrainingSteps(random_examples(40), seed=0, **options).digest
    half = len(first) // 2
    assert (first[0].tokens != first[half].tokens).any()


def test_rows_of_one_example_are_not_longer_than_need_be():
    examples = [example(n, 10 * n) for n in (5, 60, 64, 65, 100, 150)]
    steps = TrainingSteps(examples, rows=1, length=160, epochs=1, seed=0, pack=False)
    found = {int(step.tokens[0, 0, 0]) // 10: step.tokens.shape[-1] for step in steps}
    assert found == {5: 64, 60: 64, 64: 64, 65: 128, 100: 128, 150: 160}
