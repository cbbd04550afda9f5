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
from experiments.common.console import Console, device_name
from experiments.common.evaluation import evaluate
from experiments.common.stores import CellStore, Result, Settings
from experiments.common.timing import rounds_of_milliseconds
from experiments.common.training import Training
from experiments.data.dataset import Dataset
from experiments.data.images import CLASSES
from experiments.mnist.network import ADAPTED_APPLY, NETWORK
from experiments.mnist.task import finetuned
from experiments.ranks.methods import METHODS, optimizer, with_adapters
from experiments.ranks.options import GridOptions, Options

# Blocks of steps are timed, since the host runs ahead of the device in training too.
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
        """What all results depend on; a digest of the base covers how it was trained."""
        return {
            "dataset": self.dataset.name,
            "base": _fingerprint(self.base),
            "batch_size": self.options.training.batch_size,
            "jax": jax.__version__,
            "device": device_name(),
        }

    def wrapped(self, method: str, rank: int, repeat: int = 0) -> Any:
        key = jax.random.fold_in(jax.random.key(self.options.training.seed), repeat)
        return with_adapters(self.base, method, rank, self.options.grid.alpha, key)

    def ratio(self, method: str) -> float | None:
        """Returns lora_B's learning rate in multiples of lora_A's, or None if they are the same."""
        return self.options.grid.lora_plus_ratio if METHODS[method].faster_B else None


class Cell(Protocol):
    """A part of the grid that is finished and stored as a whole."""

    @property
    def rank(self) -> int: ...

    def settings(self, task: Task) -> Settings:
        """Returns everything that decides the result."""
        ...

    def result(self, task: Task) -> Result:
        """Returns the result, as JSON can hold it."""
        ...


@dataclass(frozen=True)
class FineTuning:
    """One fine-tuning: the wrong answers on each digit, the accuracy, the trainable numbers."""

    rank: int
    method: str
    repeat: int

    def __str__(self) -> str:
        return f"{METHODS[self.method].label}, rank {self.rank}"

    def settings(self, task: Task) -> Settings:
        training = task.options.training
        return {
            **task.settings,
            "cell": "fine-tuning",
            "rank": self.rank,
            "method": self.method,
            "repeat": self.repeat,
            "ratio": task.ratio(self.method),
            "alpha": task.options.grid.alpha,
            "digit": task.digit,
            "replay": training.replay,
            "seed": training.seed,
            "batches": training.finetune_batches,
            "learning_rate": training.learning_rate,
        }

    def result(self, task: Task) -> Result:
        training = task.options.training
        tuned = finetuned(
            task.wrapped(self.method, self.rank, self.repeat),
            optimizer(training.learning_rate, task.ratio(self.method)),
            task.digit,
            task.dataset,
            training,
            # The same for all variants and ranks, which are thus compared on the same batches.
            random=np.random.default_rng((training.seed, 1, self.repeat)),
            console=task.console,
        )
        # Merged weights have the base's shapes, so that one program tests all cells.
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
    """The time of a training step of each variant, measured in turns in one process.

    Plain LoRA of rank 1 takes its turns too, whatever the rank, so that ranks that were timed at
    different hours on a busy machine can be compared.
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
            # A ratio for each round, so that a machine that slows down in between changes nothing.
            "relative_time": {
                method: float(np.median(found / reference)) for method, found in times.items()
            },
        }


def cells_of(grid: GridOptions) -> list[Cell]:
    """Returns all cells, rank by rank."""
    cells: list[Cell] = []
    for rank in grid.ranks:
        cells += [
            FineTuning(rank, method, repeat)
            for method, repeat in itertools.product(grid.methods, range(grid.repeats))
        ]
        cells.append(StepTimes(rank, grid.methods))
    return cells


def results(
    cells: Sequence[Cell], task: Task, store: CellStore, console: Console
) -> dict[Cell, Result]:
    """Returns the result of each cell, stored by an earlier run or computed and stored now."""
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
    """Returns a function that takes some steps, and returns the params to wait for."""
    chosen, train = task.options.training, task.dataset.train
    tx = optimizer(chosen.learning_rate, task.ratio(method))
    training = Training(ADAPTED_APPLY, task.wrapped(method, rank), tx)
    batch_size = chosen.batch_size
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
