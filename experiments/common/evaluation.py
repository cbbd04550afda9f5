"""Testing a classifier: how often it is right, and which classes it gets wrong."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from experiments.common.console import Console
from experiments.common.training import ApplyFn, cross_entropy

_BATCH_SIZE = 1000


class Examples(Protocol):
    """Inputs, and the number of each one's class."""

    @property
    def inputs(self) -> NDArray[Any]: ...

    @property
    def labels(self) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class Evaluation:
    """What a classifier said of each test example."""

    predictions: NDArray[np.int32]
    labels: NDArray[np.int32]
    loss: float

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.predictions == self.labels))

    @property
    def measured(self) -> dict[str, float]:
        """The numbers that choose the best training."""
        return {"accuracy": self.accuracy, "loss": self.loss}

    def wrong_counts(self, classes: int) -> list[int]:
        """Returns, for each class, how many of its examples were taken for another class."""
        wrong = self.labels[self.predictions != self.labels]
        return np.bincount(wrong, minlength=classes).tolist()


def evaluate(
    apply_fn: ApplyFn, params: Any, examples: Examples, *, console: Console, description: str
) -> Evaluation:
    """Returns the predictions of `apply_fn` for all the examples, and the mean loss."""
    count = len(examples.labels)
    starts = range(0, count, _BATCH_SIZE)
    predictions, total_loss = [], 0.0
    with console.progress(description, len(starts)) as progress:
        for start in starts:
            labels = examples.labels[start : start + _BATCH_SIZE]
            predicted, loss = _predicted(
                apply_fn, params, examples.inputs[start : start + _BATCH_SIZE], labels
            )
            predictions.append(np.asarray(predicted))
            total_loss += float(loss) * len(labels)
            progress.advance()
            progress.show(f"loss {total_loss / (start + len(labels)):.4f}")
    return Evaluation(np.concatenate(predictions), examples.labels, total_loss / count)


@partial(jax.jit, static_argnums=0)
def _predicted(apply_fn: ApplyFn, params: Any, inputs: Array, labels: Array) -> tuple[Array, Array]:
    logits = apply_fn({"params": params}, inputs)
    return logits.argmax(axis=-1), cross_entropy(logits, labels)
