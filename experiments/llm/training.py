"""A training on language, and the loss on held-out examples."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

import lora_jax
from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.common.memory import return_freed_memory
from experiments.common.resumable import Evaluated, ResumableTraining
from experiments.llm.loss import summed_loss
from experiments.llm.mesh import Devices
from experiments.llm.options import TrainingOptions
from experiments.llm.packing import Batch, PackedBatches
from experiments.llm.step import stacked, training_step
from experiments.llm.task import LanguageTask

GREATEST_GRADIENT = 1.0


class Training(ResumableTraining):
    """One training of a language model, by one method."""

    def __init__(
        self,
        task: LanguageTask,
        params: Any,
        training: TrainingOptions,
        *,
        packed: bool,
        devices: Devices,
    ) -> None:
        """Packs the examples, and puts adapters beside the weights."""
        devices.check_rows(training.batch_size)
        self._devices = devices
        method = training.chosen_method
        wrapped = method.wrapped(
            params,
            task.model.config,
            targets=training.targets,
            alpha=training.alpha,
            key=jax.random.key(training.seed),
        )
        self.batches = PackedBatches(
            task.train.examples,
            rows=training.batch_size,
            length=task.max_length,
            epochs=training.epochs,
            seed=training.seed,
            pack=packed,
        )
        self._accumulate = training.accumulate
        tx = optimizer(training, self.total)
        self._step_of = jax.jit(training_step(task.network.apply, tx))
        self._compiled: Any = None
        settings = {
            **training.as_json(),
            "train_examples": len(task.train.examples),
            "validation_examples": len(task.validation.examples),
            "max_length": task.max_length,
            "no_packing": not packed,
        }
        super().__init__(wrapped, tx, evaluate_every=training.evaluate_every, settings=settings)

    @property
    def total(self) -> int:
        return math.ceil(len(self.batches) / self._accumulate)

    def batches_left(self) -> Iterable[Batch]:
        return (self._batches_of(step) for step in range(self.step, self.total))

    def taken(self, batch: Batch) -> tuple[Any, optax.OptState, Mapping[str, Any]]:
        return self._compiled(self._trainable, self._state, self._frozen, batch)

    def goodness(self, evaluation: Evaluated) -> tuple[float, ...]:
        return (-evaluation["loss"],)

    def progress_note(self) -> str:
        history = self.history
        speed = history.recent("seen") / history.recent("seconds")
        return f"loss {history.recent('loss'):.4f}, {speed:.0f} tokens/s"

    def described(self, evaluation: Evaluated) -> str:
        return f"held-out loss {evaluation['loss']:.4f}, perplexity {evaluation['perplexity']:.3f}"

    def position(self) -> Any:
        return {"batches": len(self.batches), "examples": self.batches.digest}

    def check_position(self, position: Any) -> None:
        if position != self.position():
            raise InputError(
                f"the training to continue had {position['batches']:,} batches of other examples "
                f"than these {len(self.batches):,}; pass the data that it began with, or leave out "
                "--resume to train again"
            )

    def compile(self, console: Console) -> None:
        """Compiles the step, which all batches share."""
        with console.progress("Compiling", 1) as progress:
            arguments = self._trainable, self._state, self._frozen, self._batches_of(0)
            self._compiled = self._step_of.lower(*arguments).compile()
            progress.advance()
        return_freed_memory()

    @property
    def step_bytes(self) -> int:
        """The memory of the step: arguments, results, temporaries."""
        found = self._compiled.memory_analysis()
        return (
            found.argument_size_in_bytes
            + found.output_size_in_bytes
            + found.temp_size_in_bytes
            - found.alias_size_in_bytes
        )

    def _batches_of(self, step: int) -> Batch:
        numbers = range(step * self._accumulate, (step + 1) * self._accumulate)
        held = [self.batches[number] for number in numbers if number < len(self.batches)]
        empty = jax.tree.map(np.zeros_like, self.batches[0])
        whole = stacked([*held, *[empty] * (self._accumulate - len(held))])
        return self._devices.placed_batch(whole)


def optimizer(training: TrainingOptions, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with a learning rate that rises and falls, and gradients that are clipped."""
    greatest = training.learning_rate or training.chosen_method.learning_rate
    warmup = min(max(1, round(training.warmup * steps)), steps - 1) if training.warmup else 0
    start = 0.0 if warmup else greatest
    rates = optax.warmup_cosine_decay_schedule(start, greatest, warmup, steps)
    return optax.chain(
        optax.clip_by_global_norm(GREATEST_GRADIENT),
        optax.adamw(rates, weight_decay=training.weight_decay),
    )


class Examination:
    """The loss on held-out examples."""

    def __init__(self, task: LanguageTask, *, rows: int, packed: bool, devices: Devices) -> None:
        """Packs the examples once."""
        self._devices = devices
        self._batches = PackedBatches(
            task.validation.examples,
            rows=rows,
            length=task.max_length,
            epochs=1,
            seed=0,
            pack=packed,
        )
        adapted = lora_jax.adapt(task.network.apply)
        self._loss = jax.jit(lambda wrapped, batch: summed_loss(adapted, wrapped, batch))

    def __call__(self, wrapped: Any) -> dict[str, float]:
        """Returns the loss of a learned token, and its exponential."""
        placed = map(self._devices.placed_batch, self._batches)
        total = sum(float(self._loss(wrapped, batch)) for batch in placed)
        loss = total / sum(float(batch.weights.sum()) for batch in self._batches)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
