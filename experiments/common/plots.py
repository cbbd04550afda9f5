"""What the pictures of all studies have in common; they are drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.common.files import atomic_path

# Colour-blind readers can tell these apart too (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_DOTS_PER_INCH = 150
_LEAST_WINDOW = 10


def save_figure(figure: Figure, *panels: Axes, path: Path) -> None:
    """Writes the picture, whole or not at all."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DOTS_PER_INCH, format="png")


def save_losses(path: Path, losses: Mapping[str, NDArray[np.float32]], title: str) -> None:
    """Draws the loss of each step and its moving average, with a panel for each phase."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(losses), squeeze=False)[0]
    for index, (axes, (name, values)) in enumerate(zip(panels, losses.items(), strict=True)):
        window = min(len(values), max(_LEAST_WINDOW, len(values) // 50))
        average = draw_losses(axes, values, window=window, colour=COLOURS[index], size=2)
        axes.set(xlabel="step", title=f"{name} (line: mean of {window} steps)")
        # A few steps far above the others would flatten the average, which is what matters here.
        axes.set_ylim(0, 1.5 * float(average.max()))
    panels[0].set_ylabel("cross-entropy")
    figure.suptitle(title)
    save_figure(figure, *panels, path=path)


def draw_losses(
    axes: Axes,
    losses: Sequence[float] | NDArray[np.float32],
    *,
    window: int,
    colour: str,
    size: float,
    label: str | None = None,
) -> NDArray[np.float64]:
    """Draws each step's loss as a point and the moving average as a line; returns the average.

    Args:
      axes: where to draw.
      losses: those of steps 1, 2, ...
      window: how many steps the average is taken over.
      colour: that of points and line.
      size: that of the points.
      label: what the legend calls the line.
    """
    steps = np.arange(1, len(losses) + 1)
    average = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(steps, losses, ".", color=colour, alpha=0.3, markersize=size)
    axes.plot(steps[window - 1 :], average, color=colour, label=label)
    return average
