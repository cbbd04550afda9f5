"""ROUGE: overlaps counted by hand, several references, and intervals."""

import numpy as np
import pytest

from experiments.llm.rouge import mean_score, rouge

pytest.importorskip("rouge_score")


def f_measure(overlap, answer, reference):
    precision, recall = overlap / answer, overlap / reference
    return 2 * precision * recall / (precision + recall)


def test_overlaps_counted_by_hand():
    scores = rouge(["the cat sat on mats"], [["a cat is sitting on the mat"]])
    # cat, on, the and mat, of 5 and 7 words: only longer words are stemmed to one form.
    assert scores["rouge1"] == pytest.approx(f_measure(4, 5, 7))
    assert scores["rouge2"] == 0
    # In one order: cat, on, mat.
    assert scores["rougeL"] == pytest.approx(f_measure(3, 5, 7))


def test_the_mean_is_over_references_and_then_over_answers():
    answers = ["one two", "three four"]
    alone = [rouge([answers[0]], [[text]])["rouge1"] for text in ("one two", "one six")]
    both = rouge(answers, [["one two", "one six"], ["nothing"]])["rouge1"]
    assert both == pytest.approx([np.mean(alone), 0])
    assert mean_score(both).mean == pytest.approx(np.mean(both))


def test_intervals_hold_the_mean_and_shrink_with_more_answers():
    random = np.random.default_rng(0)
    words = np.array(["one", "two", "three", "four", "five", "six"])

    def scored(count):
        pairs = random.choice(words, (count, 2, 4))
        answers, references = ([" ".join(row) for row in part] for part in pairs.transpose(1, 0, 2))
        return mean_score(rouge(answers, [[each] for each in references])["rouge1"])

    few, many = scored(20), scored(320)
    for score in (few, many):
        assert score.low < score.mean < score.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    same = mean_score(rouge(["a b"] * 5, [["a b"]] * 5)["rouge1"])
    assert (same.mean, same.low, same.high) == (1, 1, 1)
