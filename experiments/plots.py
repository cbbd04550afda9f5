"""The pictures of a study, drawn without a display."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.output import atomic_path

# Told apart by colour-blind readers too (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DOTS_PER_INCH = 150
_BAR_GROUP_WIDTH = 0.8
_LEAST_WINDOW = 10
# How far apart, in doublings of the rank, points stand that would hide each other.
_DODGE = 0.07


@dataclass(frozen=True)
class Panel:
    """One quantity over the rank.

    Attributes:
      quantity: its name, and what else the reader needs to know of it.
      curves: for each method, the values that were found at each rank.
    """

    quantity: str
    curves: Mapping[str, Sequence[Sequence[float]]]


def save_wrong_counts(
    path: Path, counts: Mapping[str, Sequence[int]], tuned_digit: int, title: str
) -> None:
    """Draws, for each digit, a bar for each classifier: how many images it got wrong."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    width = _BAR_GROUP_WIDTH / len(counts)
    for index, (name, values) in enumerate(counts.items()):
        offset = (index - (len(counts) - 1) / 2) * width
        bars = axes.bar(
            np.arange(len(values)) + offset, values, width, label=name, color=COLOURS[index]
        )
        axes.bar_label(bars, fontsize=8, padding=1)
    axes.set_xticks(range(10))
    axes.axvspan(tuned_digit - 0.5, tuned_digit + 0.5, color="0.92", zorder=0)
    axes.set(xlabel="digit (shaded: the one fine-tuned on)", ylabel="wrong answers", title=title)
    axes.margins(y=0.1)
    axes.legend(frameon=False)
    save_figure(figure, axes, path=path)


def save_losses(path: Path, losses: Mapping[str, NDArray[np.float32]], title: str) -> None:
    """Draws each step's loss as a point, the moving average as a line; a panel for each phase."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(losses), squeeze=False)[0]
    for index, (axes, (name, values)) in enumerate(zip(panels, losses.items(), strict=True)):
        window = min(len(values), max(_LEAST_WINDOW, len(values) // 50))
        average = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(values, ".", color=COLOURS[index], alpha=0.3, markersize=2)
        axes.plot(np.arange(len(average)) + window - 1, average, color=COLOURS[index])
        axes.set(xlabel="step", title=f"{name} (line: mean of {window} steps)")
        # Single steps far above would flatten the average, which is what there is to see.
        axes.set_ylim(0, 1.5 * float(average.max()))
    panels[0].set_ylabel("cross-entropy")
    figure.suptitle(title)
    save_figure(figure, *panels, path=path)


def save_rank_curves(path: Path, ranks: Sequence[int], panels: Sequence[Panel], title: str) -> None:
    """Draws a line through each method's means, and a bar from the least to the greatest value."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_rank_curves(axes, ranks, panel)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title)
    save_figure(figure, *all_axes, path=path)


def _draw_rank_curves(axes: Axes, ranks: Sequence[int], panel: Panel) -> None:
    for index, (name, values) in enumerate(panel.curves.items()):
        dodge = _DODGE * (index - (len(panel.curves) - 1) / 2)
        means = np.array([np.mean(found) for found in values])
        least, most = ([extreme(found) for found in values] for extreme in (min, max))
        # The mean of equal numbers may round to beside them.
        reach = np.maximum(0, [means - least, most - means])
        axes.errorbar(
            np.log2(ranks) + dodge,
            means,
            yerr=reach,
            label=name,
            color=COLOURS[index],
            marker=_MARKERS[index],
            markersize=5,
            linewidth=1.5,
            elinewidth=1,
        )
    axes.set_xticks(np.log2(ranks), [str(rank) for rank in ranks])
    axes.set(xlabel="rank", title=panel.quantity)
    axes.grid(axis="y", color="0.9")


def save_figure(figure: Figure, *panels: Axes, path: Path) -> None:
    """Writes the picture, whole or not at all."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DOTS_PER_INCH, format="png")
