"""Compares ranks and variants of LoRA on the task of `mnist_lora`."""

import sys
from collections.abc import Sequence

import jax

from experiments.base_checkpoint import BaseCheckpoint
from experiments.cell_store import CellStore
from experiments.command import exit_code
from experiments.console import Console, device_line
from experiments.data import load
from experiments.evaluation import evaluate
from experiments.mnist_task import (
    NETWORK,
    base_settings,
    check_adapters_fit,
    digit_to_tune,
    pretrained,
)
from experiments.output import writable_folder
from experiments.rank_cells import Task, grid, results
from experiments.rank_methods import with_adapters
from experiments.rank_options import Options, parsed
from experiments.rank_report import Findings, present
from experiments.timing import Stopwatch


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study with these arguments and returns the exit code of the process."""
    return exit_code(lambda: study(parsed(argv)))


def study(options: Options) -> None:
    """Fine-tunes one base network in every way of the grid, and compares the outcomes."""
    console = Console(to_stderr=options.json)
    console.note(device_line())
    out = writable_folder(options.out, "--out")
    watch = Stopwatch()
    _check_all_adapters_fit(options)
    dataset = load(options.data, options.data_dir, options.mnist_dir, console)
    watch.phase_ended("data")

    settings = base_settings(options, dataset)
    own, other = (
        BaseCheckpoint(folder, settings) for folder in (out / "base_checkpoint", options.base)
    )
    base = pretrained(dataset, own, options, console, others=[other])
    watch.phase_ended("pretraining")

    before = evaluate(
        NETWORK.apply,
        base.params,
        dataset.test,
        console=console,
        description="Testing the base",
    )
    digit = digit_to_tune(before, options, console)
    watch.phase_ended("testing")

    task = Task(dataset, base.params, digit, options, console.without_progress())
    store, cells = CellStore(out / "cells", console), grid(options)
    if options.fresh:
        for cell in cells:
            store.discard(cell.settings(task))
    found = results(cells, task, store, console)
    watch.phase_ended("cells")
    present(Findings(dataset, digit, before, found), options, watch, console)


def _check_all_adapters_fit(options: Options) -> None:
    """Raises where a rank is too high for a layer, before any training."""
    for method in options.methods:
        check_adapters_fit(
            lambda params, method=method: with_adapters(
                params, method, max(options.ranks), options.alpha, jax.random.key(0)
            )
        )


if __name__ == "__main__":
    sys.exit(main())
