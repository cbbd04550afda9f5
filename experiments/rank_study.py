"""Compares ranks and variants of LoRA on the task of `mnist_lora`."""

import sys
from collections.abc import Sequence

import jax

from experiments.common.errors import exit_code
from experiments.common.evaluation import evaluate
from experiments.common.run import Run
from experiments.common.stores import BaseCheckpoint, CellStore
from experiments.mnist.network import NETWORK, check_adapters_fit
from experiments.mnist.task import base_settings, digit_to_tune, pretrained
from experiments.ranks.cells import Task, cells_of, results
from experiments.ranks.methods import with_adapters
from experiments.ranks.options import GridOptions, Options, parsed
from experiments.ranks.report import Findings, present


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study with these arguments and returns the exit code of the process."""
    return exit_code(lambda: study(parsed(argv)))


def study(options: Options) -> None:
    """Fine-tunes one base network in every way of the grid, and compares the outcomes."""
    run = Run(options.output)
    console, training, out = run.console, options.training, options.output.out
    _check_all_adapters_fit(options.grid)
    dataset = options.data.loaded(console)
    run.phase_ended("data")

    settings = base_settings(training, dataset)
    own, other = (
        BaseCheckpoint(folder, settings) for folder in (out / "base_checkpoint", options.grid.base)
    )
    base = pretrained(dataset, own, training, console, others=[other])
    run.phase_ended("pretraining")

    before = evaluate(
        NETWORK.apply, base.params, dataset.test, console=console, description="Testing the base"
    )
    digit = digit_to_tune(before, training, console)
    run.phase_ended("testing")

    task = Task(dataset, base.params, digit, options, console.without_progress())
    store, cells = CellStore(out / "cells", console), cells_of(options.grid)
    if options.grid.fresh:
        for cell in cells:
            store.discard(cell.settings(task))
    found = results(cells, task, store, console)
    run.phase_ended("cells")
    present(Findings(dataset, digit, before, found), options, run)


def _check_all_adapters_fit(grid: GridOptions) -> None:
    """Raises if a rank is too high for a layer, before any training."""
    for method in grid.methods:
        check_adapters_fit(
            lambda params, method=method: with_adapters(
                params, method, max(grid.ranks), grid.alpha, jax.random.key(0)
            )
        )


if __name__ == "__main__":
    sys.exit(main())
