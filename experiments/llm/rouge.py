"""ROUGE (Lin, 2004): how much of what people wrote a model writes too."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.common.errors import needed_module

KINDS = ("rouge1", "rouge2", "rougeL")

_RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)


class Score(NamedTuple):
    """A mean over answers, and the interval in which it is with 95 % confidence."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def rouge(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, NDArray[np.float64]]:
    """Returns the scores of each answer, the mean over its references, words stemmed.

    Args:
      answers: what a model wrote.
      references: what people wrote, one text or several for each answer.
    """
    scorer = needed_module("rouge_score.rouge_scorer", "lora-jax[llm]").RougeScorer(
        KINDS, use_stemmer=True
    )
    each = np.array(
        [
            np.mean(
                [[found.fmeasure for found in scorer.score(one, answer).values()] for one in own],
                axis=0,
            )
            for answer, own in zip(answers, references, strict=True)
        ]
    )
    return {kind: each[:, place] for place, kind in enumerate(KINDS)}


def mean_score(values: NDArray[np.float64]) -> Score:
    """Returns the mean over answers of their scores, or of differences of two scores of each.

    The interval is that of means over answers that are drawn from these with replacement (Efron,
    1979).
    """
    random = np.random.default_rng(0)
    drawn = random.integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), _INTERVAL)
    return Score(float(values.mean()), float(low), float(high))
