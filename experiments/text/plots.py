"""The pictures of the study on texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.common.plots import COLOURS, draw_losses, save_figure

_WINDOW = 10
_CONFUSION_SIZE = 1.2


def save_curves(
    path: Path,
    losses: Sequence[float],
    evaluations: Sequence[Sequence[float]],
    title: str,
) -> None:
    """Draws the loss in training and on held-out sentences, and the accuracy on the latter."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = min(_WINDOW, len(losses))
    label = f"mean of {window} steps"
    draw_losses(left, losses, window=window, colour=COLOURS[0], size=3, label=label)
    steps, accuracies, held_out = zip(*evaluations, strict=True)
    left.plot(steps, held_out, "o-", color=COLOURS[1], label="held-out sentences")
    left.set(xlabel="step", ylabel="cross-entropy", title="loss")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    right.plot(steps, accuracies, "o-", color=COLOURS[1])
    best = int(np.argmax(accuracies))
    right.annotate(
        f"{accuracies[best]:.3f}",
        (steps[best], accuracies[best]),
        textcoords="offset points",
        xytext=(0, 6),
        ha="center",
    )
    right.set(xlabel="step", title="accuracy on held-out sentences")
    right.margins(y=0.15)
    right.grid(axis="y", color="0.9")
    figure.suptitle(title)
    save_figure(figure, left, right, path=path)


def save_confusion(
    path: Path, counts: NDArray[np.int64], classes: Sequence[str], title: str
) -> None:
    """Draws how often each class was taken for each other."""
    side = 2.5 + _CONFUSION_SIZE * len(classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        text = f"{count:,}\n{shares[row, column]:.1%}"
        axes.text(column, row, text, ha="center", va="center", color=colour)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes)
    axes.set_yticks(ticks, classes, rotation=90, va="center")
    axes.set(xlabel="predicted", ylabel="label", title=title)
    save_figure(figure, axes, path=path)


def save_comparison(path: Path, accuracies: Mapping[str, Sequence[float]], title: str) -> None:
    """Draws every accuracy as a point, and the mean of each method as a line."""
    figure = Figure(figsize=(8, 1.5 + 0.5 * len(accuracies)), layout="constrained")
    axes = figure.subplots()
    for place, (name, found) in enumerate(reversed(accuracies.items())):
        colour = COLOURS[0 if "rank" in name else 1]
        axes.plot(found, [place] * len(found), "o", color=colour, alpha=0.6)
        axes.plot([np.mean(found)] * 2, [place - 0.25, place + 0.25], color=colour, linewidth=2)
    axes.set_yticks(range(len(accuracies)), list(reversed(accuracies)))
    axes.set(xlabel="accuracy on the test sentences (line: mean over seeds)", title=title)
    axes.grid(axis="x", color="0.9")
    save_figure(figure, axes, path=path)
