"""The picture of the MNIST study."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.common.plots import COLOURS, save_figure

_BAR_GROUP_WIDTH = 0.8


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
