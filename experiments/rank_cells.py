"""The cells of the grid: one fine-tuning, or the step times of all variants at one rank."""

import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

import lora_jax
from experiments.cell_store import CellStore, Result, Settings
from experiments.console import Console, device_name
from experiments.data import Dataset
from experiments.data.dataset import CLASSES
from experiments.evaluation import evaluate
from experiments.mnist_task import ADAPTED_APPLY, NETWORK, finetuned
from experiments.rank_methods import METHODS, optimizer, with_adapters
from experiments.rank_options import Options
from experiments.timing import rounds_of_milliseconds
from experiments.training import Training

# A block of steps, since the host runs ahead of the device in training too.
_STEPS_TIMED_AT_ONCE = 20
_TIMING_ROUNDS = 15
_REFERENCE_METHOD, _REFERENCE_RANK = "lora", 1


@dataclass(frozen=True)
class Task:
    """What all cells start from."""

    dataset: Dataset
    base: Any
    digit: int
    options: Options
    console: Console

    @functools.cached_property
    def settings(self) -> Settings:
        """What decides the results of all cells alike; the base stands for how it was trained."""
        return {
            "dataset": self.dataset.name,
            "base": _fingerprint(self.base),
            "batch_size": self.options.batch_size,
            "jax": jax.__version__,
            "device": device_name(),
        }

    def wrapped(self, method: str, rank: int, repeat: int = 0) -> Any:
        key = jax.random.fold_in(jax.random.key(self.options.seed), repeat)
        return with_adapters(self.base, method, rank, self.options.alpha, key)

    def ratio(self, method: str) -> float | None:
        """Returns how many times lora_A's learning rate lora_B's is, None where they are one."""
        return self.options.lora_plus_ratio if METHODS[method].faster_B else None


class Cell(Protocol):
    """A part of the grid that is finished and stored as a whole."""

    @property
    def rank(self) -> int: ...

    def settings(self, task: Task) -> Settings:
        """Returns all that decides the result."""
        ...

    def result(self, task: Task) -> Result:
        """Returns what JSON can hold."""
        ...


@dataclass(frozen=True)
class FineTuning:
    """One fine-tuning: wrong answers of each digit, accuracy, and the trainable numbers."""

    rank: int
    method: str
    repeat: int

    def __str__(self) -> str:
        return f"{METHODS[self.method].label}, rank {self.rank}"

    def settings(self, task: Task) -> Settings:
        options = task.options
        return {
            **task.settings,
            "cell": "fine-tuning",
            "rank": self.rank,
            "method": self.method,
            "repeat": self.repeat,
            "ratio": task.ratio(self.method),
            "alpha": options.alpha,
            "digit": task.digit,
            "replay": options.replay,
            "seed": options.seed,
            "batches": options.finetune_batches,
            "learning_rate": options.learning_rate,
        }

    def result(self, task: Task) -> Result:
        tuned = finetuned(
            task.wrapped(self.method, self.rank, self.repeat),
            optimizer(task.options.learning_rate, task.ratio(self.method)),
            task.digit,
            task.dataset,
            task.options,
            # The same for all variants and ranks, which are thus compared on the same batches.
            random=np.random.default_rng((task.options.seed, 1, self.repeat)),
            console=task.console,
        )
        # Merged weights have the base's shapes, so that all cells are tested by one program.
        evaluation = evaluate(
            NETWORK.apply,
            lora_jax.merge(tuned.params),
            task.dataset.test,
            console=task.console,
            description="Testing",
        )
        return {
            "wrong_counts": evaluation.wrong_counts(CLASSES),
            "accuracy": evaluation.accuracy,
            "trainable": lora_jax.count_parameters(tuned.params).trainable,
        }


@dataclass(frozen=True)
class StepTimes:
    """The time of a training step of each variant, taken in turns in one process.

    Plain LoRA of rank 1 takes its turns among them, whatever the rank, so that ranks that were
    timed at different hours of a busy machine can be compared.
    """

    rank: int
    methods: Sequence[str]

    def __str__(self) -> str:
        return f"step times, rank {self.rank}"

    def settings(self, task: Task) -> Settings:
        return {
            **task.settings,
            "cell": "step times",
            "rank": self.rank,
            "methods": list(self.methods),
            "steps": _STEPS_TIMED_AT_ONCE,
            "rounds": _TIMING_ROUNDS,
        }

    def result(self, task: Task) -> Result:
        blocks = {method: _block_of_steps(method, self.rank, task) for method in self.methods}
        blocks[""] = _block_of_steps(_REFERENCE_METHOD, _REFERENCE_RANK, task)
        times = rounds_of_milliseconds(
            blocks,
            _TIMING_ROUNDS,
            console=task.console,
            description="Timing",
        )
        reference = times.pop("")
        return {
            "milliseconds": {
                method: float(np.median(found)) / _STEPS_TIMED_AT_ONCE
                for method, found in times.items()
            },
            # Each round by itself, so that a machine that slows down in between changes nothing.
            "relative_time": {
                method: float(np.median(found / reference)) for method, found in times.items()
            },
        }


def grid(options: Options) -> list[Cell]:
    """Returns all cells, rank by rank."""
    cells: list[Cell] = []
    for rank in options.ranks:
        cells += [
            FineTuning(rank, method, repeat)
            for method, repeat in itertools.product(options.methods, range(options.repeats))
        ]
        cells.append(StepTimes(rank, tuple(options.methods)))
    return cells


def results(
    cells: Sequence[Cell], task: Task, store: CellStore, console: Console
) -> dict[Cell, Result]:
    """Returns the result of each cell: stored by an earlier run, or computed and stored now."""
    stored = {cell: store.load(cell.settings(task)) for cell in cells}
    found = {cell: result for cell, result in stored.items() if result is not None}
    missing = [cell for cell in cells if cell not in found]
    if found:
        console.note(
            f"Cells: {len(found)} of {len(cells)} reused from {store.folder} "
            "(--fresh computes them again)"
        )
    if not missing:
        return found
    with console.progress("Computing cells", len(missing)) as progress:
        for rank, of_rank in itertools.groupby(missing, lambda cell: cell.rank):
            start = time.perf_counter()
            for cell in of_rank:
                progress.show(str(cell))
                found[cell] = cell.result(task)
                store.save(cell.settings(task), found[cell])
                progress.advance()
            console.note(f"Rank {rank}: done in {time.perf_counter() - start:.1f} s")
        progress.show("")
    return found


def _block_of_steps(method: str, rank: int, task: Task) -> Callable[[], Any]:
    """Returns a function that takes some steps and returns what has to be waited for."""
    tx = optimizer(task.options.learning_rate, task.ratio(method))
    training = Training(ADAPTED_APPLY, task.wrapped(method, rank), tx)
    train, batch_size = task.dataset.train, task.options.batch_size
    batch = (train.inputs[:batch_size], train.labels[:batch_size])

    def block() -> Any:
        for _ in range(_STEPS_TIMED_AT_ONCE):
            training.take_step(*batch)
        return training.params

    return block


def _fingerprint(params: Any) -> str:
    """Returns a digest of every number of the network."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(params):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()
