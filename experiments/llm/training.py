"""A training on language, and the loss on held-out examples."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

from experiments.common.adamw import clipped_adamw, warmed_up
from experiments.common.compiled_steps import CompiledSteps
from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.common.memory import MEGABYTE, peak_bytes, return_freed_memory
from experiments.common.resumable import Evaluated, ResumableTraining
from experiments.llm.mesh import Devices
from experiments.llm.methods import with_rows
from experiments.llm.objectives import Answers
from experiments.llm.options import TrainingOptions
from experiments.llm.packing import Batch, TrainingSteps
from experiments.llm.soft_prompt import prompted, start_of, without_prompt
from experiments.llm.step import training_step
from experiments.llm.task import LanguageTask

Optimizer = Callable[[optax.Schedule], optax.GradientTransformation]


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
        optimizer: Optimizer | None = None,
    ) -> None:
        """Packs the examples, and puts adapters beside the weights.

        Args:
          task: the model, and the examples.
          params: its weights.
          training: how it trains.
          packed: whether several examples share a row.
          devices: where it trains.
          optimizer: what takes steps with given learning rates; AdamW with clipped gradients if
            None.

        Raises:
          InputError: `lora_jax.wrap` refuses a setting, or a soft prompt can't start as it should.
        """
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
        if task.model.added and training.method != "full":
            wrapped = with_rows(wrapped, task.model.added_ids)
        if training.soft_prompt is not None:
            start = start_of(
                task.model.network().apply,
                params,
                task.texts.tokenizer,
                training.soft_prompt,
                training.soft_prompt_from,
                seed=training.seed,
            )
            wrapped = prompted(wrapped, start)
        self.steps = TrainingSteps(
            task.train.examples,
            rows=training.batch_size,
            length=row_length(task, training),
            epochs=training.epochs,
            seed=training.seed,
            accumulate=training.accumulate,
            together=training.chosen_objective.together,
            pack=packed,
            groups=devices.groups,
        )
        rates = warmed_up(training.greatest_learning_rate, warmup=training.warmup, steps=self.total)
        if optimizer is None:
            tx = clipped_adamw(rates, weight_decay=training.weight_decay)
        else:
            tx = optimizer(rates)
        objective = training.chosen_objective
        self.compiled = CompiledSteps(training_step(task.network.apply, tx, objective))
        settings = {
            **training.as_json(),
            "train_examples": len(task.train.examples),
            "validation_examples": len(task.validation.examples),
            "max_length": task.max_length,
            "add_tokens": [[each.text, each.start] for each in task.model.added],
            "no_packing": not packed,
        }
        super().__init__(wrapped, tx, evaluate_every=training.evaluate_every, settings=settings)

    @property
    def total(self) -> int:
        return len(self.steps)

    def batches_left(self) -> Iterable[Batch]:
        numbers = range(self.step, self.total)
        return (self._devices.placed_batch(self.steps[number]) for number in numbers)

    def taken(self, batch: Batch) -> tuple[Any, optax.OptState, Mapping[str, Any]]:
        return self.compiled(batch.lengths, *self._arguments(batch))

    def goodness(self, evaluation: Evaluated) -> tuple[float, ...]:
        return (-evaluation["loss"],)

    def progress_note(self) -> str:
        history = self.history
        speed = history.recent("seen") / history.recent("seconds")
        peak = f"{peak_bytes() / MEGABYTE:,.0f} MB"
        return f"loss {history.recent('loss'):.4f}, {speed:.0f} tokens/s, {peak}"

    def described(self, evaluation: Evaluated) -> str:
        found = [f"{name} {evaluation[name]:.4f}" for name in evaluation if name != "step"]
        return f"held-out {', '.join(found)}"

    def position(self) -> Any:
        return {"steps": len(self.steps), "examples": self.steps.digest}

    def check_position(self, position: Any) -> None:
        if position != self.position():
            raise InputError(
                f"the training to continue had {position['steps']:,} steps on other examples than "
                f"these {len(self.steps):,}; pass the data that it began with, or leave out "
                "--resume to train again"
            )

    def compile(self, console: Console) -> None:
        """Compiles the step for each length of rows."""
        first = self.steps.first_of_each_length()
        with console.progress("Compiling", len(first)) as progress:
            for batch in first:
                placed = self._devices.placed_batch(batch)
                self.compiled.compile(batch.lengths, *self._arguments(placed))
                progress.advance()
        return_freed_memory()

    def _arguments(self, batch: Batch) -> tuple[Any, ...]:
        return self._trainable, self._state, self._frozen, batch


def row_length(task: LanguageTask, training: TrainingOptions) -> int:
    """Returns the tokens of a row, which has room for the examples that belong together."""
    return task.max_length * training.chosen_objective.together


class Examination:
    """What the objective is on held-out examples."""

    def __init__(
        self,
        task: LanguageTask,
        base: Any,
        training: TrainingOptions,
        *,
        packed: bool,
        devices: Devices,
    ) -> None:
        """Packs the examples once; `base` are the parameters before anything has trained."""
        self._devices, self._base = devices, base
        self._objective = training.chosen_objective
        self._steps = TrainingSteps(
            task.validation.examples,
            rows=training.batch_size,
            length=row_length(task, training),
            epochs=1,
            seed=0,
            together=self._objective.together,
            pack=packed,
            groups=devices.groups,
        )
        objective, apply = self._objective, task.network.apply
        self._sums = jax.jit(functools.partial(objective.sums, apply))

    def __call__(self, wrapped: Any) -> dict[str, float]:
        """Returns the mean loss of a part, and what else the objective measures.

        Of answers it is also the perplexity, the exponential of the loss of a token.
        """
        return self._means(wrapped, self._steps.batches())

    def of_base(self) -> dict[str, float]:
        """Returns the same of the model as it was, which reads no soft prompt."""
        return self._means(self._base, map(without_prompt, self._steps.batches()))

    def _means(self, wrapped: Any, batches: Iterable[Batch]) -> dict[str, float]:
        totals: dict[str, float] = {}
        parts = 0.0
        for batch in batches:
            placed = self._devices.placed_batch(batch)
            for name, value in self._sums(wrapped, self._base, placed).items():
                totals[name] = totals.get(name, 0.0) + float(value)
            parts += float(self._objective.count(batch))
        means = {name: total / parts for name, total in totals.items()}
        if isinstance(self._objective, Answers):
            means["perplexity"] = math.exp(min(means["loss"], 700.0))
        return means
