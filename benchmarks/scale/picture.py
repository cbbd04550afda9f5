"""A bar for each plan: the memory of one device by kind, beside what the device has."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.machines import CPU, GIB, MACHINES
from benchmarks.scale.plans import Plan, Task
from experiments.common.plots import COLOURS, save_figure

_PARTS = {
    "base": "frozen weights",
    "trained": "what trains",
    "optimizer": "state of the optimiser",
    "activations": "inputs of the layers",
    "temporaries": "other temporaries",
}


def save_picture(path: Path, rows: Sequence[tuple[Task, Plan]]) -> None:
    """Writes the picture of some plans."""
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (task, plan) in enumerate(rows):
        start = 0.0
        for colour, part in zip(COLOURS, _PARTS, strict=False):
            width = getattr(plan, part) / GIB
            label = _PARTS[part] if place == 0 else None
            axes.barh(place, width, left=start, color=colour, label=label)
            start += width
        if task.machine != CPU:
            memory = MACHINES[task.machine].memory / GIB
            axes.plot([memory] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
    names = [f"{task.model} {task.kind}, {task.devices} {task.machine}" for task, _ in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel("GiB of one device (black: what it has)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    save_figure(figure, axes, path=path)
