"""The pictures of the grid: ROUGE by method, and by rank."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.dialogsum.cells import Cell, Found, Grid
from benchmarks.dialogsum.report import scores_of
from experiments.common.plots import COLOURS, save_figure


def save_picture(path: Path, grid: Grid, found: Mapping[str, Found]) -> None:
    """Draws ROUGE-1 of every method, and of every rank on a smaller budget."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    methods, ranks = figure.subplots(1, 2)
    _draw_methods(
        methods, {cell: found[name] for name, cell in grid.methods.items() if name in found}
    )
    _draw_ranks(ranks, {name: found[name] for name in grid.ranks if name in found})
    save_figure(figure, methods, ranks, path=path)


def _draw_methods(axes: Axes, found: Mapping[Cell, Found]) -> None:
    for place, (cell, result) in enumerate(found.items()):
        score = scores_of(result)["rouge1"]
        colour = COLOURS[5] if cell.training is None else COLOURS[0]
        axes.barh(place, score.mean, color=colour, height=0.6)
        axes.plot([score.low, score.high], [place, place], color="black", linewidth=1)
    axes.set_yticks(range(len(found)), [cell.label for cell in found])
    axes.invert_yaxis()
    axes.set(xlabel="ROUGE-1, with 95 % confidence", title="1,000 dialogues, 500 answers")


def _draw_ranks(axes: Axes, found: Mapping[str, Found]) -> None:
    ranks = [result["training"]["rank"] for result in found.values()]
    scores = [scores_of(result)["rouge1"] for result in found.values()]
    means = [score.mean for score in scores]
    errors = [
        [score.mean - score.low for score in scores],
        [score.high - score.mean for score in scores],
    ]
    axes.errorbar(ranks, means, errors, fmt="o-", color=COLOURS[0], capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, map(str, ranks))
    axes.set(xlabel="rank", ylabel="ROUGE-1", title="250 dialogues, 100 answers")
