"""A training on sentences that can be interrupted and resumed without a difference in any bit."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

import lora_jax
from experiments.common.console import Console, Steps
from experiments.common.errors import InputError, as_input_error
from experiments.common.evaluation import Evaluation
from experiments.common.memory import return_freed_memory
from experiments.data.tokens import Position, TokenBatch, TrainingBatches, lengths_up_to
from experiments.text.methods import Method
from experiments.text.options import TrainingOptions
from experiments.text.step import CompiledSteps, optimizer
from experiments.text.task import TextTask
from lora_jax.checkpoint import TrainingCheckpoints

_RECENT = 20

Keep = Callable[[Any], None]
Examine = Callable[[Any], Evaluation]


@dataclass
class History:
    """What a run has seen so far; all of it is saved in checkpoints.

    Attributes:
      losses: the loss of each step.
      accuracies: the accuracy of each step on its own batch.
      seconds: the time of each step.
      evaluations: step, accuracy and loss of each test on the held-out sentences.
    """

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float, float] | None:
        """The evaluation with the greatest accuracy, and among equals the least loss."""
        return max(self.evaluations, key=_goodness, default=None)

    @property
    def steps_per_second(self) -> float:
        return len(self.seconds) / sum(self.seconds)


def _goodness(evaluation: tuple[int, float, float]) -> tuple[float, float]:
    _, accuracy, loss = evaluation
    return accuracy, -loss


class Training:
    """One training: the state that it has reached, and the steps that are left."""

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
        self.steps = steps or CompiledSteps(task.apply, tx, dropout)
        self.history = History()
        self._every = training.evaluate_every
        self._batch_size = training.batch_size
        self._key = keys[1]
        self._trainable, self._frozen = lora_jax.split(wrapped)
        self._state = tx.init(self._trainable)
        self._step = 0
        self._settings = {
            **training.as_json(),
            "method": str(method),
            "train_examples": len(task.train),
            "validation_examples": len(task.validation),
            "max_length": task.max_length,
        }

    @property
    def wrapped(self) -> Any:
        return lora_jax.combine(self._trainable, self._frozen)

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return self._step

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

    def run(
        self,
        examine: Examine,
        keep: Keep,
        *,
        console: Console,
        checkpoints: TrainingCheckpoints | None = None,
    ) -> None:
        """Takes the steps that are left; an interruption leaves a checkpoint behind.

        Args:
          examine: tests a wrapped tree on the held-out sentences.
          keep: gets the wrapped tree whenever it is the best so far.
          console: where progress is shown.
          checkpoints: where to save; nowhere if None.
        """
        left = self.batches.starting_at(self.batches.position(self._step)) if self._left else ()
        try:
            with console.progress("Training", self._left) as progress:
                self._evaluate_if_due(examine, keep, console, checkpoints)
                for batch in left:
                    self._take_step(batch)
                    self._show(progress)
                    self._evaluate_if_due(examine, keep, console, checkpoints)
        except KeyboardInterrupt:
            if checkpoints is not None:
                self.save(checkpoints)
                console.note(
                    f"A checkpoint of step {self._step} is kept: --resume continues from it"
                )
            raise

    def save(self, checkpoints: TrainingCheckpoints) -> None:
        """Saves the state, unless it is saved already."""
        if self._step in (0, checkpoints.latest_step):
            return
        checkpoints.save(
            self._step,
            self.wrapped,
            self._state,
            data_position={
                "position": dataclasses.asdict(self.batches.position(self._step)),
                "settings": self._settings,
                "history": self._history_so_far(),
            },
        )

    def resume(self, checkpoints: TrainingCheckpoints) -> None:
        """Continues from the latest checkpoint.

        Raises:
          InputError: there is no checkpoint, or it is that of other settings.
        """
        if checkpoints.latest_step is None:
            raise InputError("--resume finds no checkpoint in --out; train without it first")
        with as_input_error():
            restored = checkpoints.restore(self.wrapped, self._state)
        position = restored.data_position
        self._check_settings(position["settings"])
        self.batches.starting_at(Position(**position["position"]))
        self._trainable, _ = lora_jax.split(restored.wrapped)
        self._state = restored.optimizer_state
        self._step = restored.step
        self.history = History(**position["history"])

    @property
    def _left(self) -> int:
        return len(self.batches) - self._step

    def _arguments(self, batch: TokenBatch) -> tuple[Any, ...]:
        number = np.int32(self._step)
        return self._trainable, self._state, self._frozen, batch, number, self._key

    def _take_step(self, batch: TokenBatch) -> None:
        start = time.perf_counter()
        trainable, state, loss, right = self.steps(batch.mask.shape[1], *self._arguments(batch))
        loss, right = jax.device_get((loss, right))
        self.history.losses.append(float(loss))
        self.history.accuracies.append(float(right))
        self.history.seconds.append(time.perf_counter() - start)
        # One statement, so that an interruption finds a step either taken or not begun.
        self._trainable, self._state, self._step = trainable, state, self._step + 1

    def _history_so_far(self) -> dict[str, Any]:
        """Returns the history without the traces of an interrupted step."""
        history = dataclasses.asdict(self.history)
        evaluations = history.pop("evaluations")
        return {
            **{name: values[: self._step] for name, values in history.items()},
            "evaluations": evaluations,
        }

    def _show(self, progress: Steps) -> None:
        history = self.history
        speed = self._batch_size / np.mean(history.seconds[-_RECENT:])
        progress.show(
            f"loss {np.mean(history.losses[-_RECENT:]):.4f}, "
            f"accuracy {np.mean(history.accuracies[-_RECENT:]):.3f}, {speed:.0f} examples/s"
        )
        progress.advance()

    def _evaluate_if_due(
        self,
        examine: Examine,
        keep: Keep,
        console: Console,
        checkpoints: TrainingCheckpoints | None,
    ) -> None:
        last = self.history.evaluations[-1][0] if self.history.evaluations else 0
        is_due = self._step % self._every == 0 or self._left == 0
        if self._step == last or not is_due:
            return
        wrapped = self.wrapped
        found = examine(wrapped)
        evaluation = (self._step, found.accuracy, found.loss)
        is_best = self.history.best is None or _goodness(evaluation) > _goodness(self.history.best)
        if is_best:
            keep(wrapped)
        self.history.evaluations.append(evaluation)
        console.note(
            f"Step {self._step} of {len(self.batches)}: held-out accuracy {found.accuracy:.4f}, "
            f"loss {found.loss:.4f}{', the best so far' if is_best else ''}"
        )
        if checkpoints is not None:
            self.save(checkpoints)

    def _check_settings(self, stored: dict[str, Any]) -> None:
        for name, value in self._settings.items():
            if stored.get(name) != value:
                raise InputError(
                    f"--{name.replace('_', '-')} is {value}, but the training to continue has "
                    f"{stored.get(name)}; pass that, or leave out --resume to train again"
                )
