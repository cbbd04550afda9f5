"""What each format of the frozen weights costs in accuracy, on the studies of MNIST and of text.

MNIST: the study's network is pretrained for an epoch; then, for each format, its three kernels are
quantised, it is tested, and rank-1 adapters beside them are fine-tuned on the digit that the dense
network gets wrong most often, half of the images being other digits. Text: every kernel of the
pretrained encoder is quantised, and the study's adapters and head are trained on sentences. With
one seed every format sees the same pretrained weights, adapters and batches.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax

import lora_jax
from benchmarks.measuring import MeasuringParser, write_found
from experiments.common.console import Console
from experiments.common.errors import exit_code
from experiments.common.evaluation import evaluate
from experiments.common.memory import keep_freed_memory
from experiments.common.options import positive_int
from experiments.common.stores import BaseCheckpoint
from experiments.common.tables import Table
from experiments.data.dataset import Dataset
from experiments.data.images import CLASSES, load_images
from experiments.mnist import options as mnist
from experiments.mnist.network import ADAPTED_APPLY, LAYERS
from experiments.mnist.task import base_settings, digit_to_tune, finetuned, pretrained
from experiments.mnist_lora import with_adapters
from experiments.models.bert import Encoder
from experiments.text import options as text
from experiments.text.comparison import trained_result
from experiments.text.methods import Method
from experiments.text.task import loaded_texts, text_task
from experiments.text.training import Training

DENSE = "dense"
FORMATS = (DENSE, "nf4", "int8", "int4", "fp8_e4m3")
STUDIES = ("mnist", "text")
_ENCODER_KERNELS = "kernel"

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints a table for each study, and returns the exit code."""
    return exit_code(lambda: _compare(_parser().parse_args(argv)))


def _compare(options: argparse.Namespace) -> None:
    console = Console()
    studies = {"mnist": _mnist_rows, "text": _text_rows}
    found: dict[str, list[Row]] = {}
    for study in options.study or STUDIES:
        found[study] = []
        for row in studies[study](options, console):
            found[study].append(row)
            console.note(", ".join(f"{name} {value}" for name, value in row.items()))
    metrics = {"seeds": options.seeds, "studies": found}
    for table in tables(metrics):
        table.show(console)
    write_found(options, metrics)


def quantized(params: Any, targets: str | Sequence[str], name: str) -> Any:
    """Returns params with these weights in a format; as they are for `DENSE`."""
    return params if name == DENSE else lora_jax.quantize(params, targets, format=name)


# --- MNIST -------------------------------------------------------------------------------------


def _mnist_rows(options: argparse.Namespace, console: Console) -> Iterator[Row]:
    dataset = load_images("auto", None, None, console)
    for seed in range(options.seeds):
        training = mnist.TrainingOptions(seed=seed, replay=0.5)
        folder = options.out / f"mnist_base_{seed}"
        base = pretrained(
            dataset, BaseCheckpoint(folder, base_settings(training, dataset)), training, console
        )
        digit = None
        for name in options.format or FORMATS:
            if digit is None:
                digit = digit_to_tune(_tested(base.params, dataset, console), training, console)
            yield _mnist_row(base.params, name, digit, dataset, training, console)


def _mnist_row(
    base: Any,
    name: str,
    digit: int,
    dataset: Dataset,
    training: mnist.TrainingOptions,
    console: Console,
) -> Row:
    params = quantized(base, LAYERS, name)
    before = _tested(params, dataset, console)
    chosen = mnist.Options(training=training)
    tuned = finetuned(
        with_adapters(params, chosen),
        lora_jax.optimizer(optax.adam(training.learning_rate)),
        digit,
        dataset,
        training,
        random=np.random.default_rng((training.seed, 1)),
        console=console,
    )
    after = _tested(tuned.params, dataset, console)
    return {
        "format": name,
        "seed": training.seed,
        "digit": digit,
        "errors of the base": sum(before.wrong_counts(CLASSES)),
        "the digit's": before.wrong_counts(CLASSES)[digit],
        "errors, tuned": sum(after.wrong_counts(CLASSES)),
        "the digit's, tuned": after.wrong_counts(CLASSES)[digit],
    }


def _tested(params: Any, dataset: Dataset, console: Console) -> Any:
    return evaluate(ADAPTED_APPLY, params, dataset.test, console=console, description="Testing")


# --- text --------------------------------------------------------------------------------------


def _text_rows(options: argparse.Namespace, console: Console) -> Iterator[Row]:
    chosen = text.parsed([])
    encoder = Encoder.read(chosen.data.model)
    dataset = loaded_texts(chosen.data, console)
    for name in options.format or FORMATS:
        params = quantized(encoder.params, _ENCODER_KERNELS, name)
        in_format = dataclasses.replace(encoder, params=params)
        steps = None
        for seed in range(options.seeds):
            task = text_task(dataset, in_format, chosen.data, seed=seed)
            training = Training(task, Method("lora", 8), chosen.training, seed=seed, steps=steps)
            steps = training.steps
            accuracy = trained_result(training, task, console)["accuracy"]
            yield {"format": name, "seed": seed, "accuracy": round(accuracy, 4)}


# --- report ------------------------------------------------------------------------------------


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Returns what `--json` writes, as a table for each study."""
    suffix = "" if found["seeds"] == 1 else ": mean, and greatest less least"
    return [
        _table(f"{study}, seeds: {found['seeds']}{suffix}", rows)
        for study, rows in found["studies"].items()
    ]


def _table(title: str, rows: Sequence[Row]) -> Table:
    measured = [name for name in rows[0] if name not in ("format", "seed", "digit")]
    formats = list(dict.fromkeys(row["format"] for row in rows))
    cells = {
        name: {
            column: [row[column] for row in rows if row["format"] == name] for column in measured
        }
        for name in formats
    }
    return Table(
        title,
        ["format", *measured],
        [[name, *(_spread(cells[name][column]) for column in measured)] for name in formats],
    )


def _spread(values: Sequence[float]) -> str:
    style = "{:.4f}" if isinstance(values[0], float) else "{:.1f}"
    mean = style.format(statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({style.format(max(values) - min(values))})"


def _parser() -> MeasuringParser:
    parser = MeasuringParser("quantized_accuracy", __doc__)
    parser.add_argument("--study", action="append", choices=STUDIES, help="one study only")
    parser.add_argument(
        "--format", action="append", choices=FORMATS, help="one format only (may be repeated)"
    )
    parser.add_argument("--seeds", type=positive_int, default=3, metavar="N", help="0 to N - 1")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/quantized_accuracy"),
        metavar="FOLDER",
        help="where pretrained networks are kept",
    )
    return parser


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
