"""The pictures of the study on images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.common.plots import save_figure
from experiments.images.drawing import DIGITS, Drawn

_SHOWN = 2


def save_samples(path: Path, drawn: Drawn, title: str) -> None:
    """Draws some pictures of each digit."""
    shown = min(4, drawn.pictures.shape[1])
    figure = Figure(figsize=(7, 0.75 * shown + 0.6), layout="constrained")
    axes = figure.subplots(1, 1)
    axes.imshow(_tiled(drawn.pictures[:, :shown]), cmap="gray_r", vmin=-1, vmax=1)
    axes.set_axis_off()
    figure.suptitle(title)
    save_figure(figure, axes, path=path)


def save_grid(
    path: Path,
    rows: Sequence[tuple[str, Drawn, Sequence[int]]],
    held_out: Sequence[int],
    title: str,
) -> None:
    """Draws each digit in every way.

    Args:
      path: the picture to write.
      rows: the name of each way, what was drawn, and the digits that it should have learned.
      held_out: the digits that the base has never seen.
      title: the title.
    """
    others = [digit for digit in DIGITS if digit not in held_out]
    figure = Figure(figsize=(9.5, 1.1 * len(rows) + 1), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(rows), 1))
    for axes, (name, drawn, learned) in zip(panels, rows, strict=True):
        axes.imshow(_tiled(drawn.pictures[:, :_SHOWN]), cmap="gray_r", vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[])
        shares = [f"{drawn.recognised[digit]:.0%} of {digit}" for digit in held_out]
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        of_others = f"{drawn.mean_of(others):.0%} of others"
        axes.yaxis.set_label_position("left")
        axes.text(
            1.01,
            0.5,
            "\n".join([*shares, of_others]),
            transform=axes.transAxes,
            va="center",
            fontsize=7,
        )
        for digit in learned:
            _framed(axes, digit, drawn.pictures.shape[-1])
    figure.suptitle(title, fontsize=9)
    save_figure(figure, *panels, path=path)


def _framed(axes: object, digit: int, side: int) -> None:
    """Draws a frame around the pictures of a digit."""
    from matplotlib.patches import Rectangle

    place, size = (digit * side - 0.5, -0.5), (side, _SHOWN * side)
    axes.add_patch(Rectangle(place, *size, fill=False, edgecolor="#D55E00"))  # type: ignore[attr-defined]


def _tiled(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns pictures (digits, shown, side, side) as one, a column for each digit."""
    assert len(pictures) == len(DIGITS)
    columns = [np.concatenate(list(own), axis=0) for own in pictures]
    return np.concatenate(columns, axis=1)
