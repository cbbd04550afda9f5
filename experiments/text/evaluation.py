"""Testing a classifier of sentences."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from experiments.common.evaluation import Evaluation
from experiments.common.training import ApplyFn
from experiments.data.tokens import (
    TokenBatch,
    TokenizedTexts,
    evaluation_batches,
    in_order,
    lengths_up_to,
)

_BATCH_SIZE = 32


class Examination:
    """Sentences with known classes, in batches that are made once."""

    def __init__(self, texts: TokenizedTexts, *, max_length: int) -> None:
        self._labels = texts.labels
        self._batches = batches_of(texts, max_length=max_length)

    def __call__(self, apply_fn: ApplyFn, params: Any) -> Evaluation:
        """Returns the classifier's prediction for each sentence."""
        logs = log_probabilities(apply_fn, params, self._batches)
        loss = -logs[np.arange(len(logs)), self._labels].mean()
        return Evaluation(logs.argmax(axis=-1).astype(np.int32), self._labels, float(loss))


def batches_of(texts: TokenizedTexts, *, max_length: int) -> list[TokenBatch]:
    return evaluation_batches(texts, batch_size=_BATCH_SIZE, lengths=lengths_up_to(max_length))


def log_probabilities(
    apply_fn: ApplyFn, params: Any, batches: Sequence[TokenBatch]
) -> NDArray[np.float32]:
    """Returns the logarithm of each class's probability, for each sentence."""
    return in_order(
        batches, [_log_probabilities(apply_fn, params, *batch[:2]) for batch in batches]
    )


@partial(jax.jit, static_argnums=0)
def _log_probabilities(apply_fn: ApplyFn, params: Any, token_ids: Array, mask: Array) -> Array:
    return jax.nn.log_softmax(apply_fn({"params": params}, token_ids, mask))
