"""A training that can be interrupted and resumed without a difference in any bit."""

import abc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from experiments.common.console import Console, Steps
from experiments.common.errors import InputError, as_input_error, interrupts_held
from lora_jax.checkpoint import TrainingCheckpoints

Evaluated = dict[str, float]
Keep = Callable[[Any], None]
Examine = Callable[[Any], Mapping[str, float]]

_RECENT = 20


@dataclass
class History:
    """What a run has seen so far; all of it is saved in checkpoints.

    Attributes:
      steps: what each step measured, by name; `seconds` is its time.
      evaluations: what each test on the held-out examples found, and after which `step`.
    """

    steps: dict[str, list[float]] = field(default_factory=dict)
    evaluations: list[Evaluated] = field(default_factory=list)

    def add_step(self, measured: Mapping[str, Any]) -> None:
        for name, value in measured.items():
            self.steps.setdefault(name, []).append(float(value))

    def of(self, name: str) -> list[float]:
        """Returns what each step measured of one thing."""
        return self.steps.get(name, [])

    def recent(self, name: str) -> float:
        """Returns the mean of the last steps."""
        return float(np.mean(self.of(name)[-_RECENT:]))

    @property
    def steps_per_second(self) -> float:
        return len(self.of("seconds")) / sum(self.of("seconds"))


class ResumableTraining(abc.ABC):
    """One training: the state that it has reached, and the steps that are left.

    Attributes:
      history: what it has seen so far.
      settings: what a training that continues it must have too, by option.
    """

    def __init__(
        self,
        wrapped: Any,
        tx: optax.GradientTransformation,
        *,
        evaluate_every: int,
        settings: Mapping[str, Any],
    ) -> None:
        """Begins a training.

        Args:
          wrapped: what trains, and what it stands on.
          tx: the optimiser of the half that trains.
          evaluate_every: after how many steps it is tested, and a checkpoint left.
          settings: what a training that continues this one must have too, by option.
        """
        self.history = History()
        self._every = evaluate_every
        self.settings = dict(settings)
        trainable, self._frozen = lora_jax.split(wrapped)
        # A step takes the memory of what trains, which may be the caller's, or frozen as well.
        self._trainable = jax.tree.map(jnp.copy, trainable)
        self._state = tx.init(self._trainable)
        self._step = 0

    # --- what kinds of trainings differ in

    @property
    @abc.abstractmethod
    def total(self) -> int:
        """How many steps there are."""

    @abc.abstractmethod
    def batches_left(self) -> Iterable[Any]:
        """Returns the batches of the steps that are left."""

    @abc.abstractmethod
    def taken(self, batch: Any) -> tuple[Any, optax.OptState, Mapping[str, Any]]:
        """Returns what trains and its state after a step on a batch, and what the step measured.

        The step may take the memory of what trained before.
        """

    @abc.abstractmethod
    def goodness(self, evaluation: Evaluated) -> tuple[float, ...]:
        """Returns what is greater for a better evaluation."""

    @abc.abstractmethod
    def progress_note(self) -> str:
        """Returns what the progress bar says beside its steps."""

    @abc.abstractmethod
    def described(self, evaluation: Evaluated) -> str:
        """Returns an evaluation in words."""

    @abc.abstractmethod
    def position(self) -> Any:
        """Returns where the data is, as JSON can hold it, for a checkpoint."""

    @abc.abstractmethod
    def check_position(self, position: Any) -> None:
        """Raises an `InputError` if data that was at this position does not continue here."""

    # --- what they have in common

    @property
    def wrapped(self) -> Any:
        return lora_jax.combine(self._trainable, self._frozen)

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return self._step

    @property
    def best(self) -> Evaluated | None:
        """The best evaluation so far."""
        return max(self.history.evaluations, key=self.goodness, default=None)

    def begin(self, checkpoints: TrainingCheckpoints, *, resume: bool, console: Console) -> None:
        """Continues what was interrupted, or makes way for a new training."""
        if resume:
            self.resume(checkpoints)
            console.note(f"Continuing from step {self._step}")
        elif checkpoints.latest_step is not None:
            console.note(
                f"A new training: the checkpoint of step {checkpoints.latest_step} is deleted"
            )
            checkpoints.delete_after(-1)

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
          examine: tests a wrapped tree on the held-out examples.
          keep: gets the wrapped tree whenever it is the best so far, until the next step.
          console: where progress is shown.
          checkpoints: where to save; nowhere if None.
        """
        left = self.batches_left() if self._left else ()
        try:
            with console.progress("Training", self._left) as progress:
                self._evaluate_if_due(examine, keep, console, checkpoints)
                for batch in left:
                    self.take_step(batch)
                    self._show(progress)
                    self._evaluate_if_due(examine, keep, console, checkpoints)
        except KeyboardInterrupt:
            if checkpoints is not None:
                self.save(checkpoints)
                console.note(
                    f"A checkpoint of step {self._step} is kept: --resume continues from it"
                )
            raise

    def take_step(self, batch: Any) -> None:
        """Takes the next step, and adds what it measured to the history."""
        start = time.perf_counter()
        # An interruption finds a step either taken or not begun.
        with interrupts_held():
            self._trainable, self._state, measured = self.taken(batch)
            measured = jax.device_get(measured)
            self.history.add_step({**measured, "seconds": time.perf_counter() - start})
            self._step += 1

    def save(self, checkpoints: TrainingCheckpoints) -> None:
        """Saves the state, unless it is saved already."""
        if self._step in (0, checkpoints.latest_step):
            return
        checkpoints.save(
            self._step,
            self.wrapped,
            self._state,
            data_position={
                "position": self.position(),
                "settings": self.settings,
                "history": asdict(self.history),
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
        stored = restored.data_position
        self._check_settings(stored["settings"])
        self.check_position(stored["position"])
        self._trainable, _ = lora_jax.split(restored.wrapped)
        self._state = restored.optimizer_state
        self._step = restored.step
        self.history = History(**stored["history"])

    @property
    def _left(self) -> int:
        return self.total - self._step

    def _show(self, progress: Steps) -> None:
        progress.show(self.progress_note())
        progress.advance()

    def _evaluate_if_due(
        self,
        examine: Examine,
        keep: Keep,
        console: Console,
        checkpoints: TrainingCheckpoints | None,
    ) -> None:
        evaluations = self.history.evaluations
        last = evaluations[-1]["step"] if evaluations else 0
        is_due = self._step % self._every == 0 or self._left == 0
        if self._step == last or not is_due:
            return
        wrapped = self.wrapped
        found = {"step": self._step, **examine(wrapped)}
        is_best = self.best is None or self.goodness(found) > self.goodness(self.best)
        if is_best:
            keep(wrapped)
        evaluations.append(found)
        console.note(
            f"Step {self._step} of {self.total}: {self.described(found)}"
            f"{', the best so far' if is_best else ''}"
        )
        if checkpoints is not None:
            self.save(checkpoints)

    def _check_settings(self, stored: Mapping[str, Any]) -> None:
        for name, value in self.settings.items():
            if stored.get(name) != value:
                raise InputError(
                    f"--{name.replace('_', '-')} is {value}, but the training to continue has "
                    f"{stored.get(name)}; pass that, or leave out --resume to train again"
                )
