"""How fast each method trains, and in how much memory: a step of each in turn, in one process."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dialogsum.cells import Cell, Grid
from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.common.timing import in_turns
from experiments.llm.dialogsum import NAME as DIALOGSUM
from experiments.llm.mesh import Devices
from experiments.llm.options import ModelOptions, Options, parsed
from experiments.llm.task import language_task, loaded_params
from experiments.llm.training import Training
from experiments.models.pretrained import LanguageModel

NAME = "speed"
# The first step of each finds no memory that another has left.
_WARM_UP_ROUNDS = 1
# Enough for some twenty steps of the greatest batches.
_EXAMPLES = 500


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a method.

    Attributes:
      tokens_per_second: how fast each was.
      bytes: the memory of one: its arguments and temporaries.
    """

    tokens_per_second: Sequence[float]
    bytes: int


def timed_cells(grid: Grid) -> list[Cell]:
    """Returns the cells whose trainings differ in more than their seed."""
    trained = (cell for cell in grid.methods.values() if cell.training is not None)
    return [cell for cell in trained if "--seed" not in (cell.training or ())]


def timed_steps(
    grid: Grid, *, rounds: int, model: Path | None, options: Sequence[str], console: Console
) -> Mapping[str, Steps]:
    """Returns a step of each cell's training in each round.

    Args:
      grid: the cells.
      rounds: how many steps each takes; another one comes before them.
      model: another model than the packaged one.
      options: options of `llm_lora` for every training, besides those of the cells.
      console: where progress is shown.

    Raises:
      InputError: a training has fewer steps.
    """
    chosen = [*options, *([] if model is None else ["--model", str(model)])]
    chosen_of = {cell.name: _options_of(cell, chosen) for cell in timed_cells(grid)}
    # Methods on the same weights share them.
    params_of = functools.cache(functools.partial(_params, console=console))
    trainings = {
        name: _begun(each, params_of(each.what_learns)) for name, each in chosen_of.items()
    }
    steps = min(each.total for each in trainings.values())
    if rounds + _WARM_UP_ROUNDS > steps:
        raise InputError(f"--rounds is {rounds}; expected at most {steps - _WARM_UP_ROUNDS}")
    for each in trainings.values():
        each.compile(console)
    batches = {name: iter(each.batches_left()) for name, each in trainings.items()}
    with console.progress("Taking steps in turns", rounds + _WARM_UP_ROUNDS) as progress:
        for order in in_turns(list(trainings), rounds + _WARM_UP_ROUNDS):
            for name in order:
                trainings[name].take_step(next(batches[name]))
            progress.advance()
    return {
        name: Steps(_tokens_per_second(each), each.compiled.bytes)
        for name, each in trainings.items()
    }


def _options_of(cell: Cell, others: Sequence[str]) -> Options:
    data = ["--data", DIALOGSUM, "--train-examples", str(_EXAMPLES)]
    return parsed([*data, *(cell.training or ()), *others])


def _params(chosen: ModelOptions, *, console: Console) -> Any:
    return loaded_params(LanguageModel.read(chosen.model), chosen, Devices.of(None), console)


def _begun(options: Options, params: Any) -> Training:
    """Returns a training before its first step."""
    model, devices = LanguageModel.read(options.what_learns.model), Devices.of(None)
    dtype = options.what_learns.dtype
    task = language_task(model, options.data, options.training, dtype=dtype, devices=devices)
    return Training(task, params, options.training, packed=True, devices=devices)


def _tokens_per_second(training: Training) -> list[float]:
    seen, seconds = (np.array(training.history.of(name)) for name in ("seen", "seconds"))
    return (seen / seconds)[_WARM_UP_ROUNDS:].tolist()


def as_result(found: Mapping[str, Steps]) -> dict[str, Any]:
    """Returns what is stored of a measurement."""
    return {
        "tokens_per_second": {name: list(each.tokens_per_second) for name, each in found.items()},
        "step_bytes": {name: each.bytes for name, each in found.items()},
    }
