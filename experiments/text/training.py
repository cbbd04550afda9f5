"""Training on sentences: the step, and a run that can be left and taken up again to the bit."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

import lora_jax
from experiments.console import Console, Steps
from experiments.data.tokens import Position, TokenBatch, TrainingBatches, lengths_up_to
from experiments.errors import InputError, as_input_error
from experiments.evaluation import Evaluation
from experiments.memory import return_freed_memory
from experiments.text.methods import Method
from experiments.text.options import TrainingOptions
from experiments.text.task import TextTask, adapted_apply
from experiments.training import ApplyFn, cross_entropy
from lora_jax.checkpoint import TrainingCheckpoints

GREATEST_GRADIENT = 1.0
_RECENT = 20

Keep = Callable[[Any], None]
Examine = Callable[[Any], Evaluation]


@dataclass
class History:
    """What a run has seen so far; all of it goes into checkpoints.

    Attributes:
      losses: each step's.
      accuracies: each step's, on its own batch.
      seconds: what each step took.
      evaluations: step, accuracy and loss of each test on what is held out.
    """

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float, float] | None:
        """The evaluation with the greatest accuracy; of several, that with the least loss."""
        return max(self.evaluations, key=_goodness, default=None)

    @property
    def steps_per_second(self) -> float:
        return len(self.seconds) / sum(self.seconds)


def _goodness(evaluation: tuple[int, float, float]) -> tuple[float, float]:
    _, accuracy, loss = evaluation
    return accuracy, -loss


class CompiledSteps:
    """The training step of one method, compiled once for each length of batches."""

    def __init__(self, apply_fn: ApplyFn, tx: optax.GradientTransformation, dropout: float) -> None:
        self._step = jax.jit(_training_step(apply_fn, tx, dropout))
        self._compiled: dict[int, Any] = {}

    def compile(self, length: int, *arguments: Any) -> None:
        if length not in self._compiled:
            self._compiled[length] = self._step.lower(*arguments).compile()

    def __call__(self, length: int, *arguments: Any) -> Any:
        self.compile(length, *arguments)
        return self._compiled[length](*arguments)

    @property
    def bytes(self) -> int:
        """What the step of the longest batches has in memory: arguments, results and between."""
        found = self._compiled[max(self._compiled)].memory_analysis()
        sizes = (
            found.argument_size_in_bytes,
            found.output_size_in_bytes,
            found.temp_size_in_bytes,
            -found.alias_size_in_bytes,
        )
        return sum(sizes)


def _training_step(
    apply_fn: ApplyFn, tx: optax.GradientTransformation, dropout: float
) -> Callable[..., Any]:
    adapted = adapted_apply(apply_fn, dropout)

    def step(
        trainable: Any,
        state: optax.OptState,
        frozen: Any,
        batch: TokenBatch,
        number: Array,
        key: PRNGKeyArray,
    ) -> tuple[Any, optax.OptState, Array, Array]:
        # A key of its own for each step, so that a resumed run draws what an unbroken one does.
        model_key, adapter_key = jax.random.split(jax.random.fold_in(key, number))
        of_adapters = {"lora_key": adapter_key} if dropout else {}

        def loss_of(trainable: Any) -> tuple[Array, Array]:
            logits = adapted(
                {"params": lora_jax.combine(trainable, frozen)},
                batch.token_ids,
                batch.mask,
                deterministic=False,
                rngs={"dropout": model_key},
                **of_adapters,
            )
            right = (logits.argmax(axis=-1) == batch.labels).mean()
            return cross_entropy(logits, batch.labels), right

        (loss, right), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        updates, state = tx.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss, right

    return step


def learning_rates(options: TrainingOptions, method: Method, steps: int) -> optax.Schedule:
    """Returns the learning rate of each step: it rises from 0 and falls to 0."""
    warmup = min(max(1, round(options.warmup * steps)), steps - 1) if options.warmup else 0
    greatest = options.learning_rate or method.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else greatest, greatest, warmup, steps)


def optimizer(options: TrainingOptions, method: Method, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with those learning rates, on gradients cut to `GREATEST_GRADIENT`."""
    return optax.chain(
        optax.clip_by_global_norm(GREATEST_GRADIENT),
        optax.adamw(learning_rates(options, method, steps), weight_decay=options.weight_decay),
    )


class Training:
    """One run: what it has reached, and the steps that are left."""

    def __init__(
        self,
        task: TextTask,
        method: Method,
        options: TrainingOptions,
        *,
        seed: int,
        steps: CompiledSteps | None = None,
    ) -> None:
        keys = [jax.random.fold_in(jax.random.key(seed), number) for number in (1, 2)]
        wrapped = method.wrapped(
            task.initial_params(seed),
            task.apply,
            targets=options.targets,
            alpha=options.alpha,
            key=keys[0],
        )
        self.batches = TrainingBatches(
            task.train,
            batch_size=options.batch_size,
            epochs=options.epochs,
            seed=seed,
            lengths=lengths_up_to(task.max_length),
        )
        tx = optimizer(options, method, len(self.batches))
        dropout = options.adapter_dropout if method.has_adapters else 0.0
        self.steps = steps or CompiledSteps(task.apply, tx, dropout)
        self.history = History()
        self._every = options.evaluate_every
        self._batch_size = options.batch_size
        self._key = keys[1]
        self._trainable, self._frozen = lora_jax.split(wrapped)
        self._state = tx.init(self._trainable)
        self._step = 0
        self._settings = {
            **options.as_json(),
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
        """Takes the steps that are left; `keep` gets the wrapped tree whenever it is the best yet.

        Where it is interrupted, a checkpoint of what it has reached is left behind.
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
                console.note(f"A checkpoint of step {self._step} is kept: --resume goes on from it")
            raise

    def save(self, checkpoints: TrainingCheckpoints) -> None:
        """Saves what has been reached, unless that is saved already."""
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
        """Takes up a run where its latest checkpoint has it."""
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
        # One statement: an interruption finds a step taken, or not begun.
        self._trainable, self._state, self._step = trainable, state, self._step + 1

    def _history_so_far(self) -> dict[str, Any]:
        """Returns the history, without the traces of a step that was interrupted."""
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
            f"loss {found.loss:.4f}{', the best yet' if is_best else ''}"
        )
        if checkpoints is not None:
            self.save(checkpoints)

    def _check_settings(self, stored: dict[str, Any]) -> None:
        for name, value in self._settings.items():
            if stored.get(name) != value:
                raise InputError(
                    f"--{name.replace('_', '-')} is {value}, but the training to go on with has "
                    f"{stored.get(name)}; pass that, or train anew without --resume"
                )
