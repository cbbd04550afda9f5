"""Texts with gaps: nothing is lost, and as much is missing as was asked for."""

import numpy as np
import pytest

from experiments.pretraining.gaps import with_gaps
from experiments.pretraining.options import GapOptions

START, END, FIRST_SENTINEL = 0, 1, 1_000
SENTINELS = np.arange(FIRST_SENTINEL, FIRST_SENTINEL - 100, -1)


def example(length, seed=0, **options):
    text = np.arange(2, 2 + length)
    random = np.random.default_rng(seed)
    return with_gaps(text, GapOptions(**options), SENTINELS, random, start=START, end=END)


def spans_of(answer):
    """Returns the tokens behind each sentinel."""
    spans = {}
    for token in answer:
        if token > FIRST_SENTINEL - 100:
            spans[int(token)] = current = []
        else:
            current.append(int(token))
    return spans


@pytest.mark.parametrize("length", [2, 3, 7, 20, 100, 511])
@pytest.mark.parametrize("seed", range(3))
def test_the_answer_fills_the_gaps(length, seed):
    one = example(length, seed)
    assert (one.source[-1], one.tokens[0], one.tokens[-1]) == (END, START, END)
    assert one.learned.tolist() == [False] + [True] * (len(one.tokens) - 1)
    spans = spans_of(one.tokens[1:-1])
    # The sentinels are in their order, and the last one ends the last span.
    assert list(spans) == SENTINELS[: len(spans)].tolist()
    assert spans.pop(int(SENTINELS[len(spans) - 1])) == []
    whole = []
    for token in one.source[:-1].tolist():
        whole += spans.pop(token) if token in spans else [token]
    assert not spans
    assert whole == list(range(2, 2 + length))


def test_as_much_is_missing_as_was_asked_for():
    for options, missing, count in (({}, 30, 10), ({"missing": 0.5, "span": 5.0}, 100, 20)):
        one = example(200, **options)
        spans = spans_of(one.tokens[1:-1])
        assert sum(map(len, spans.values())) == missing
        assert len(spans) - 1 == count
        assert min(len(span) for span in list(spans.values())[:-1]) >= 1


def test_the_seed_decides_and_spans_are_anywhere():
    np.testing.assert_array_equal(example(50, 3).source, example(50, 3).source)
    assert not np.array_equal(example(50, 3).source, example(50, 4).source)
    counts = np.zeros(52)
    for seed in range(300):
        gone = np.setdiff1d(np.arange(2, 52), example(50, seed).source)
        counts[gone] += 1
    # The first token is never missing, as in T5; of the others each may be.
    assert counts[2] == 0
    assert counts[3:].min() > 0
