"""Packed rows: which examples are in which row, and what a batch says of them."""

import numpy as np
import pytest

from experiments.llm.examples import TokenizedExample
from experiments.llm.packing import PackedBatches, Row, batch_of, packed_rows


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
    assert batch.places.tolist() == [1, 2, 3, 5, 6, 7, 11, 0, 0]
    assert batch.targets.tolist() == [12, 13, 14, 21, 22, 23, 32, 0, 0]
    assert batch.weights.tolist() == [1] * 7 + [0] * 2
    flat = batch.tokens.reshape(-1)
    assert (flat[batch.places[:7] + 1] == batch.targets[:7]).all()
    with pytest.raises(ValueError, match="`room` is 3; expected at least 7"):
        batch_of(examples, [Row((0, 1)), Row((2,))], length=10, room=3)


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_has_every_example(pack):
    random = np.random.default_rng(0)
    examples = [example(int(n), 100 * k) for k, n in enumerate(random.integers(3, 15, 50))]
    batches = PackedBatches(examples, rows=4, length=16, epochs=2, seed=0, pack=pack)
    learned = sum(float(batch.weights.sum()) for batch in batches)
    assert learned == 2 * sum(len(each) - 2 for each in examples)
    assert len({batch.tokens.shape for batch in batches}) == 1
    assert len({batch.places.shape for batch in batches}) == 1
    again = PackedBatches(examples, rows=4, length=16, epochs=2, seed=0, pack=pack)
    for number in range(len(batches)):
        for one, other in zip(batches[number], again[number], strict=True):
            np.testing.assert_array_equal(one, other)
    other = PackedBatches(examples, rows=4, length=16, epochs=2, seed=1, pack=pack)
    assert (batches[0].tokens != other[0].tokens).any()
    assert batches.fullness > (0.8 if pack else 0.4)
