"""The picture of the study of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.plots import COLOURS, save_figure

_MARKERS = ("o", "s", "^", "D", "v", "P")
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
