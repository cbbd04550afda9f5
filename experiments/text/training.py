"""A training on sentences."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from experiments.common.compiled_steps import CompiledSteps
from experiments.common.console import Console
from experiments.common.memory import return_freed_memory
from experiments.common.resumable import Evaluated, ResumableTraining
from experiments.data.tokens import Position, TokenBatch, TrainingBatches, lengths_up_to
from experiments.text.methods import Method
from experiments.text.options import TrainingOptions
from experiments.text.step import optimizer, training_step
from experiments.text.task import TextTask


class Training(ResumableTraining):
    """One training on sentences, by one method."""

    def __init__(
        self,
        task: TextTask,
        method: Method,
        training: TrainingOptions,
        *,
        seed: int,
        steps: CompiledSteps | None = None,
    ) -> None:
        keys = [jax.random.fold_in(jax.random.key(seed), number) for number in (1, 2)]
        wrapped = method.wrapped(
            task.initial_params(seed),
            task.apply,
            targets=training.targets,
            alpha=training.alpha,
            key=keys[0],
        )
        self.batches = TrainingBatches(
            task.train,
            batch_size=training.batch_size,
            epochs=training.epochs,
            seed=seed,
            lengths=lengths_up_to(task.max_length),
        )
        tx = optimizer(training, method, len(self.batches))
        dropout = training.adapter_dropout if method.has_adapters else 0.0
        self.steps = steps or CompiledSteps(training_step(task.apply, tx, dropout))
        self._batch_size = training.batch_size
        self._key = keys[1]
        settings = {
            **training.as_json(),
            "method": str(method),
            "train_examples": len(task.train),
            "validation_examples": len(task.validation),
            "max_length": task.max_length,
        }
        super().__init__(wrapped, tx, evaluate_every=training.evaluate_every, settings=settings)

    @property
    def total(self) -> int:
        return len(self.batches)

    def batches_left(self) -> Iterable[TokenBatch]:
        return self.batches.starting_at(self.batches.position(self.step))

    def taken(self, batch: TokenBatch) -> tuple[Any, optax.OptState, Mapping[str, Any]]:
        trainable, state, loss, right = self.steps(batch.mask.shape[1], *self._arguments(batch))
        return trainable, state, {"loss": loss, "accuracy": right}

    def goodness(self, evaluation: Evaluated) -> tuple[float, ...]:
        """Returns what is greater for greater accuracy, and among equals for less loss."""
        return evaluation["accuracy"], -evaluation["loss"]

    def progress_note(self) -> str:
        history = self.history
        speed = self._batch_size / history.recent("seconds")
        return (
            f"loss {history.recent('loss'):.4f}, accuracy {history.recent('accuracy'):.3f}, "
            f"{speed:.0f} examples/s"
        )

    def described(self, evaluation: Evaluated) -> str:
        return f"held-out accuracy {evaluation['accuracy']:.4f}, loss {evaluation['loss']:.4f}"

    def position(self) -> Any:
        return dataclasses.asdict(self.batches.position(self.step))

    def check_position(self, position: Any) -> None:
        self.batches.starting_at(Position(**position))

    def shapes(self) -> list[tuple[int, int]]:
        return sorted(self.batches.shapes().items())

    def compile(self, console: Console) -> None:
        """Compiles the step for every length that the first epoch has."""
        count, first = len(self.shapes()), {}
        for batch in self.batches:
            first.setdefault(batch.mask.shape[1], batch)
            if len(first) == count:
                break
        with console.progress("Compiling", len(first)) as progress:
            for length, batch in first.items():
                self.steps.compile(length, *self._arguments(batch))
                progress.advance()
        return_freed_memory()

    def _arguments(self, batch: TokenBatch) -> tuple[Any, ...]:
        number = np.int32(self.step)
        return self._trainable, self._state, self._frozen, batch, number, self._key
