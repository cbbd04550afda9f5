"""The same training loop, twice: all of a network, then adapters and one layer of a copy."""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

import lora_jax
from experiments.command import (
    Parser,
    exit_code,
    positive_float,
    positive_int,
    seed,
)
from experiments.console import Console, device_line, device_name
from experiments.data import Dataset, Split, epoch_batches
from experiments.errors import as_input_error
from experiments.evaluation import evaluate
from experiments.models import MLP
from experiments.training import ApplyFn, train

_DESCRIPTION = """\
LoRA needs no second training loop.

A plain network with wide hidden layers learns two classes of random data: whether
20 numbers add up to more than zero. It is trained in full; then a copy, from the
same start, gets adapters on chosen layers and one layer that is trained in full
beside them. Both go through the same train function: only the apply function, the
parameters and the optimiser that it is given differ.
"""

NETWORK = MLP(hidden=(1000, 1000), classes=2)

_FEATURES = 20
_TRAIN_COUNT = 4000
_TEST_COUNT = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study with these arguments and returns the exit code of the process."""
    return exit_code(lambda: study(_parser().parse_args(argv)))


def study(options: argparse.Namespace) -> None:
    """Trains the network in full, then a wrapped copy of it, and compares the two."""
    console = Console(to_stderr=options.json)
    console.note(device_line())
    dataset = random_data(np.random.default_rng(options.seed))
    params = NETWORK.init(jax.random.key(options.seed), dataset.train.inputs[:1])["params"]
    wrapped = with_adapters(params, options)
    console.rule("What trains in the wrapped copy")
    console.table(["parameter", "shape", "trains as", "numbers"], parameter_rows(wrapped))

    adam = optax.adam(options.learning_rate)
    accuracy = functools.partial(
        trained_accuracy, dataset=dataset, options=options, console=console
    )
    counts = lora_jax.count_parameters(wrapped)
    metrics = {
        "device": device_name(),
        "seed": options.seed,
        "trainable": {"full": counts.original, "lora": counts.trainable},
        "accuracy": {
            "full": accuracy("full", NETWORK.apply, params, adam),
            "lora": accuracy(
                "lora", lora_jax.adapt(NETWORK.apply), wrapped, lora_jax.optimizer(adam)
            ),
        },
    }
    console.rule("The two trainings")
    console.table(
        ["training", "trainable numbers", "test accuracy"],
        [
            [name, f"{metrics['trainable'][name]:,}", f"{metrics['accuracy'][name]:.3f}"]
            for name in ("full", "lora")
        ],
    )
    if options.json:
        print(json.dumps(metrics, indent=2))


def random_data(random: np.random.Generator) -> Dataset:
    """Returns rows of normal numbers; the label says whether they add up to more than zero."""
    inputs = random.standard_normal((_TRAIN_COUNT + _TEST_COUNT, _FEATURES), np.float32)
    labels = (inputs.sum(axis=1) > 0).astype(np.int32)
    return Dataset(
        "random",
        Split(inputs[:_TRAIN_COUNT], labels[:_TRAIN_COUNT]),
        Split(inputs[_TRAIN_COUNT:], labels[_TRAIN_COUNT:]),
    )


def with_adapters(params: Any, options: argparse.Namespace) -> Any:
    """Returns `params` with adapters on the targets, and with one layer to train in full."""
    with as_input_error():
        return lora_jax.wrap(
            params,
            options.targets,
            rank=options.rank,
            alpha=options.alpha,
            key=jax.random.key(options.seed),
            train=options.train,
        )


def parameter_rows(wrapped: Any) -> list[list[str]]:
    """Returns a row for each array: its path, shape, what it trains as, and how many numbers."""
    labels = jax.tree.leaves(lora_jax.labels(wrapped))
    arrays, _ = jax.tree_util.tree_flatten_with_path(wrapped)
    return [
        [
            jax.tree_util.keystr(path, simple=True, separator="/"),
            "×".join(map(str, array.shape)) or "scalar",
            label,
            f"{array.size:,}",
        ]
        for (path, array), label in zip(arrays, labels, strict=True)
    ]


def trained_accuracy(
    name: str,
    apply_fn: ApplyFn,
    params: Any,
    tx: optax.GradientTransformation,
    *,
    dataset: Dataset,
    options: argparse.Namespace,
    console: Console,
) -> float:
    """Returns the test accuracy after training; full training and adapters both come here."""
    batches = epoch_batches(
        dataset.train,
        batch_size=options.batch_size,
        epochs=options.epochs,
        random=np.random.default_rng((options.seed, 1)),
    )
    trained = train(apply_fn, params, tx, batches, console=console, description=f"Training, {name}")
    return evaluate(
        apply_fn, trained.params, dataset.test, console=console, description=f"Testing, {name}"
    ).accuracy


def _parser() -> Parser:
    options = Parser(
        prog="python -m experiments.mlp_lora",
        description=_DESCRIPTION,
    )
    add = options.add_argument
    add("--rank", type=int, default=8, help="r: columns of lora_A and rows of lora_B")
    add("--alpha", type=float, help="the adapters count alpha/rank times (default: rank, so once)")
    add(
        "--targets",
        nargs="+",
        default=["hidden_1", "hidden_2"],
        metavar="EXPRESSION",
        help="the layers that get adapters",
    )
    add(
        "--train",
        nargs="+",
        default=["output"],
        metavar="EXPRESSION",
        help="the layers trained in full beside them",
    )
    add("--epochs", type=positive_int, default=5, help="passes over the training data")
    add("--batch-size", type=positive_int, default=64, help="rows in a step")
    add("--learning-rate", type=positive_float, default=1e-3, help="Adam's, in both trainings")
    add("--seed", type=seed, default=0, help="decides every random number")
    add("--json", action="store_true", help="print the results as JSON and nothing else")
    return options


if __name__ == "__main__":
    sys.exit(main())
