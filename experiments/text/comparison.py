"""Methods and ranks side by side, each trained with several seeds."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from experiments.common.adapter_folder import file_hash
from experiments.common.compiled_steps import CompiledSteps
from experiments.common.console import Console, device_name
from experiments.common.memory import MEGABYTE
from experiments.common.run import Run
from experiments.common.stores import CellStore, Result
from experiments.common.tables import Table
from experiments.data.dataset import TextDataset
from experiments.models.bert import Encoder
from experiments.text.evaluation import Examination
from experiments.text.methods import Method
from experiments.text.options import Options
from experiments.text.task import TextTask, adapted_apply, loaded_texts, text_task
from experiments.text.training import Training


def compare(options: Options, run: Run) -> None:
    """Trains every method with every seed, and reports means; finished cells are reused."""
    console = run.console
    encoder = Encoder.read(options.data.model)
    dataset = loaded_texts(options.data, console)
    tasks = {seed: text_task(dataset, encoder, options.data, seed=seed) for seed in options.seeds}
    store = CellStore(options.output.out / "cells", console)
    model_hash = file_hash(encoder.weights_file)
    found: dict[Method, list[Result]] = {}
    for method in options.methods:
        steps: CompiledSteps | None = None
        found[method] = []
        for seed, task in tasks.items():
            settings = _settings(method, seed, options, dataset, model_hash)
            result = store.load(settings)
            if result is None:
                training = Training(task, method, options.training, seed=seed, steps=steps)
                steps = training.steps
                console.note(f"{method}, seed {seed}")
                result = trained_result(training, task, console)
                store.save(settings, result)
            found[method].append(result)
    run.phase_ended("training")
    _present(found, tasks[options.seeds[0]], options, run)


def _settings(
    method: Method, seed: int, options: Options, dataset: TextDataset, model_hash: str
) -> dict[str, Any]:
    """Returns everything that decides the numbers of one cell."""
    return {
        "dataset": dataset.name,
        "sentences": [len(dataset.train), len(dataset.test)],
        "model": model_hash,
        "method": method.name,
        "rank": method.rank,
        "seed": seed,
        "train_examples": options.data.train_examples,
        "validation_examples": options.data.validation_examples,
        "max_length": options.data.max_length,
        "device": device_name(),
        **options.training.as_json(),
    }


def trained_result(training: Training, task: TextTask, console: Console) -> dict[str, Any]:
    """Trains; returns how well the best adapter does on the test sentences, and what it cost."""
    training.compile(console)
    examine = Examination(task.validation, max_length=task.max_length)
    adapted = adapted_apply(task.apply)
    best: list[Any] = []

    def keep(wrapped: Any) -> None:
        # The next step takes the memory of what trains.
        trainable, frozen = lora_jax.split(wrapped)
        best[:] = [lora_jax.combine(jax.tree.map(jnp.copy, trainable), frozen)]

    training.run(lambda wrapped: examine(adapted, wrapped).measured, keep, console=console)
    test = Examination(task.test, max_length=task.max_length)
    return {
        "accuracy": test(adapted, best[0]).accuracy,
        "trainable": lora_jax.count_parameters(best[0]).trainable,
        "step_bytes": training.steps.bytes,
        "steps_per_second": training.history.steps_per_second,
    }


def _present(
    found: dict[Method, list[Result]],
    task: TextTask,
    options: Options,
    run: Run,
) -> None:
    metrics = {
        "dataset": task.dataset,
        "device": device_name(),
        "seeds": list(options.seeds),
        "training": options.training.as_json(),
        "examples": {
            "train": len(task.train),
            "validation": len(task.validation),
            "test": len(task.test),
        },
        "methods": [_row(method, results) for method, results in found.items()],
    }
    for table in tables(metrics):
        table.show(run.console)
    run.finish(
        metrics,
        draw=lambda folder: _save_plot(found, task, options, folder),
        file="comparison.json",
    )


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Returns what comparison.json holds, as a table."""
    examples = metrics["examples"]
    title = (
        f"Accuracy on {examples['test']:,} test sentences after {examples['train']:,} training "
        f"sentences, {metrics['training']['epochs']} epochs; seeds: {len(metrics['seeds'])}"
    )
    header = ["method", "trainable", "accuracy", "memory of a step", "steps per second"]
    return [Table(title, header, list(map(_cells, metrics["methods"])))]


def _row(method: Method, results: Sequence[Result]) -> dict[str, Any]:
    accuracies = [result["accuracy"] for result in results]
    return {
        "method": str(method),
        "trainable": results[0]["trainable"],
        "accuracies": accuracies,
        "mean": statistics.mean(accuracies),
        "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "step_bytes": results[0]["step_bytes"],
        "steps_per_second": statistics.median(result["steps_per_second"] for result in results),
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    deviation = "" if row["deviation"] is None else f" ± {row['deviation']:.4f}"
    return [
        row["method"],
        f"{row['trainable']:,}",
        f"{row['mean']:.4f}{deviation}",
        f"{row['step_bytes'] / MEGABYTE:,.0f} MB",
        f"{row['steps_per_second']:.2f}",
    ]


def _save_plot(
    found: dict[Method, list[Result]], task: TextTask, options: Options, folder: Path
) -> None:
    # Matplotlib takes half a second to import, which --no-plots saves.
    from experiments.text.plots import save_comparison

    save_comparison(
        folder / "comparison.png",
        {str(method): [result["accuracy"] for result in found[method]] for method in found},
        title=f"{len(task.train):,} sentences of {task.dataset}, {options.training.epochs} epochs",
    )
