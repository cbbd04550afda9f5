"""The picture of a training on language."""

from pathlib import Path

from matplotlib.figure import Figure

from experiments.common.plots import COLOURS, draw_losses, save_figure
from experiments.common.resumable import History

_WINDOW = 10


def save_curve(path: Path, history: History, before: float, title: str) -> None:
    """Draws the loss in training and on held-out examples, and what it was before."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    losses = history.of("loss")
    window = min(_WINDOW, max(1, len(losses) // 3))
    label = f"training, mean of {window} steps"
    draw_losses(axes, losses, window=window, colour=COLOURS[0], size=3, label=label)
    steps = [0, *(found["step"] for found in history.evaluations)]
    held_out = [before, *(found["loss"] for found in history.evaluations)]
    axes.plot(steps, held_out, "o-", color=COLOURS[1], label="held-out examples")
    axes.set(xlabel="step", ylabel="cross-entropy of a learned token", title=title)
    axes.legend(frameon=False)
    save_figure(figure, axes, path=path)
