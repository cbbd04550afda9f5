"""What the stored cells say, as tables: for the terminal, and for the documentation."""

from collections.abc import Mapping

import numpy as np

from benchmarks.dialogsum.cells import Cell, Found, Grid
from benchmarks.dialogsum.speed import NAME as SPEED
from experiments.common.memory import MEGABYTE
from experiments.common.tables import Table
from experiments.llm.options import TrainingOptions
from experiments.llm.rouge import KINDS, Score, mean_score

_ROUGE = ("ROUGE-1", "ROUGE-2", "ROUGE-L")
_REFERENCE = "full"
_ANOTHER_SEED = "-seed-1"

Cells = Mapping[str, Cell]


def tables(grid: Grid, found: Mapping[str, Found]) -> list[Table]:
    """Returns the tables that have at least one row.

    Args:
      grid: the grid.
      found: what the finished cells have found, by name.
    """
    every = (
        _answers(grid.methods, found),
        _costs(grid.methods, found),
        _speeds(grid.methods, found),
        _differences(grid.methods, found),
        _two_seeds(grid.methods, found),
        _ranks(grid.ranks, found),
        _search(grid.search, found),
    )
    return [table for table in every if table.rows]


def scores_of(found: Found) -> dict[str, Score]:
    """Returns the means of a cell's answers, by the kind of ROUGE."""
    (own,) = found["answers"]["rouge"].values()
    return {kind: Score(**own[kind]) for kind in KINDS}


def _answers(methods: Cells, found: Mapping[str, Found]) -> Table:
    rows = [
        [
            methods[name].label,
            *map(str, scores_of(found[name]).values()),
            f"{_perplexity(found[name]):.2f}",
        ]
        for name in methods
        if name in found
    ]
    title = "Answers to 500 test dialogues, means with 95 % confidence"
    return Table(title, ["", *_ROUGE, "perplexity"], rows)


def _costs(methods: Cells, found: Mapping[str, Found]) -> Table:
    rows = []
    for name, cell in methods.items():
        if name not in found or cell.training is None:
            continue
        training = found[name]["training"]
        rows.append(
            [
                cell.label,
                f"{_learning_rate(training):g}",
                f"{training['held_out']['on']['loss']:.3f}",
                f"{training['parameters']['trainable']:,}",
                _stored(training["adapter_bytes"]),
                f"{_step_bytes(found, name) / MEGABYTE:,.0f} MB",
            ]
        )
    header = ["", "learning rate", "held-out loss", "trainable", "stored", "memory of a step"]
    return Table("What each training costs", header, rows)


def _speeds(methods: Cells, found: Mapping[str, Found]) -> Table:
    """Returns how fast each method trains beside full fine-tuning, in the same rounds."""
    rounds = found[SPEED]["tokens_per_second"] if SPEED in found else {}
    rows = [
        [
            methods[name].label,
            f"{np.median(own):.0f}",
            f"{np.median(np.divide(own, rounds[_REFERENCE])):.2f}",
        ]
        for name, own in rounds.items()
    ]
    title = "Speed of training, a step of each in turn"
    return Table(title, ["", "tokens a second", "× full fine-tuning"], rows)


def _differences(methods: Cells, found: Mapping[str, Found]) -> Table:
    """Returns how much more each method scores than full fine-tuning, dialogue by dialogue."""
    rows = []
    for name, cell in methods.items():
        if name not in found or _REFERENCE not in found or name == _REFERENCE:
            continue
        own, reference = (_each(found[one]) for one in (name, _REFERENCE))
        differences = [str(mean_score(own[kind] - reference[kind])) for kind in KINDS]
        rows.append([cell.label, *differences, _memory_ratio(cell, found, name)])
    title = "Difference to full fine-tuning on the same dialogues, with 95 % confidence"
    return Table(title, ["", *_ROUGE, "× memory of a step"], rows)


def _two_seeds(methods: Cells, found: Mapping[str, Found]) -> Table:
    """Returns the means over both seeds of a method, and how they differ from the reference's."""
    both = {
        name: _mean_of_each(found[name], found[f"{name}{_ANOTHER_SEED}"])
        for name in methods
        if name in found and f"{name}{_ANOTHER_SEED}" in found
    }
    rows = [
        [methods[name].label, *(str(mean_score(own[kind])) for kind in KINDS)]
        for name, own in both.items()
    ]
    if _REFERENCE in both:
        rows += [
            [
                f"{methods[name].label}, difference to full fine-tuning",
                *(str(mean_score(own[kind] - both[_REFERENCE][kind])) for kind in KINDS),
            ]
            for name, own in both.items()
            if name != _REFERENCE
        ]
    title = "Two seeds of each, the mean of both for each dialogue, with 95 % confidence"
    return Table(title, ["", *_ROUGE], rows)


def _mean_of_each(*found: Found) -> dict[str, np.ndarray]:
    scores = list(map(_each, found))
    return {kind: np.mean([own[kind] for own in scores], axis=0) for kind in KINDS}


def _ranks(ranks: Cells, found: Mapping[str, Found]) -> Table:
    rows = [
        [
            str(found[name]["training"]["rank"]),
            str(scores_of(found[name])["rouge1"]),
            f"{found[name]['training']['held_out']['on']['loss']:.3f}",
            f"{found[name]['training']['parameters']['trainable']:,}",
        ]
        for name in ranks
        if name in found
    ]
    title = "Ranks on 250 dialogues, answers to 100 test dialogues"
    return Table(title, ["rank", "ROUGE-1", "held-out loss", "trainable"], rows)


def _search(search: Cells, found: Mapping[str, Found]) -> Table:
    rows = [
        [
            found[name]["training"]["method"],
            f"{found[name]['training']['training']['learning_rate']:g}",
            f"{found[name]['training']['held_out']['on']['loss']:.4f}",
        ]
        for name in search
        if name in found
    ]
    (examples,) = {cell.examples for cell in search.values()}
    title = f"Search for the learning rate on {examples:,} dialogues"
    return Table(title, ["method", "learning rate", "held-out loss"], rows)


def _learning_rate(training: Found) -> float:
    """Returns the greatest learning rate: that of the method unless an option gave another."""
    chosen = training["training"]
    names = ("method", "objective", "learning_rate")
    return TrainingOptions(**{name: chosen[name] for name in names}).greatest_learning_rate


def _stored(size: float) -> str:
    return f"{size / 1e3:.0f} kB" if size < MEGABYTE / 10 else f"{size / MEGABYTE:,.1f} MB"


def _perplexity(found: Found) -> float:
    (perplexity,) = found["answers"]["perplexity"].values()
    return float(perplexity)


def _each(found: Found) -> dict[str, np.ndarray]:
    (own,) = found["answers"]["rouge_of_each"].values()
    return {kind: np.array(own[kind]) for kind in KINDS}


def _memory_ratio(cell: Cell, found: Mapping[str, Found], name: str) -> str:
    if cell.training is None:
        return ""
    return f"{_step_bytes(found, name) / _step_bytes(found, _REFERENCE):.2f}"


def _step_bytes(found: Mapping[str, Found], name: str) -> float:
    """Returns the memory of a step, where it can be that of the programs that were timed.

    Those are of one version, and cells that were computed at other times may not be.
    """
    timed = found[SPEED]["step_bytes"] if SPEED in found else {}
    return float(timed.get(name, found[name]["training"]["step_bytes"]))
