"""One training loop, used twice: for a whole network, then for adapters and one layer of a copy.

The smallest study: copy this file to begin another one.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np
import optax

import lora_jax
from experiments.common.console import Console, device_name
from experiments.common.errors import exit_code
from experiments.common.evaluation import evaluate
from experiments.common.options import Option, parsed_as
from experiments.common.run import Run
from experiments.common.shared_options import (
    AdapterOptions,
    BatchSize,
    Epochs,
    LearningRate,
    OutputOptions,
    Seed,
)
from experiments.common.training import ApplyFn, train
from experiments.data.batches import epoch_batches
from experiments.data.dataset import Dataset, Split
from experiments.models.mlp import MLP

_DESCRIPTION = """\
LoRA needs no second training loop.

A plain network with wide hidden layers learns two classes of random data: whether
20 numbers add up to more than zero. It is trained in full; then a copy with the same
initial weights gets adapters on some layers, and one layer that is trained in full
beside them. The same train function trains both: only the apply function, the
parameters and the optimiser that it is given differ.
"""

_EXAMPLES = """\
examples:
  python -m experiments.mlp_lora
  python -m experiments.mlp_lora --rank 2 --targets hidden_2 --train hidden_1 output
  python -m experiments.mlp_lora --json | jq .accuracy
"""

NETWORK = MLP(hidden=(1000, 1000), classes=2)

_FEATURES = 20
_TRAIN_COUNT = 4000
_TEST_COUNT = 1000


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller chose; `--help` says what each means."""

    adapters: AdapterOptions = AdapterOptions(rank=8, targets=("hidden_1", "hidden_2"))
    train: Annotated[
        tuple[str, ...],
        Option(
            "the layers trained in full beside the adapters", several=True, metavar="EXPRESSION"
        ),
    ] = ("output",)
    epochs: Epochs = 5
    batch_size: BatchSize = 64
    learning_rate: LearningRate = 1e-3
    seed: Seed = 0
    output: OutputOptions = OutputOptions()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study with these arguments and returns the exit code of the process."""
    return exit_code(lambda: study(parsed(argv)))


def parsed(arguments: Sequence[str] | None) -> Options:
    """Returns the options on the command line; exits, as argparse does, if one is wrong."""
    return parsed_as(
        Options, arguments, command="mlp_lora", description=_DESCRIPTION, examples=_EXAMPLES
    )


def study(options: Options) -> None:
    """Trains the network in full, then a wrapped copy of it, and compares the two."""
    run = Run(options.output)
    dataset = random_data(np.random.default_rng(options.seed))
    params = NETWORK.init(jax.random.key(options.seed), dataset.train.inputs[:1])["params"]
    wrapped = options.adapters.wrapped(params, seed=options.seed, train=options.train)
    run.console.rule("What trains in the wrapped copy")
    run.console.table(["parameter", "shape", "trains as", "numbers"], parameter_rows(wrapped))

    adam = optax.adam(options.learning_rate)
    accuracy = functools.partial(
        trained_accuracy, dataset=dataset, options=options, console=run.console
    )
    counts = lora_jax.count_parameters(wrapped)
    results = {
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
    run.console.rule("The two trainings")
    run.console.table(
        ["training", "trainable numbers", "test accuracy"],
        [
            [name, f"{results['trainable'][name]:,}", f"{results['accuracy'][name]:.3f}"]
            for name in ("full", "lora")
        ],
    )
    run.finish(results)


def random_data(random: np.random.Generator) -> Dataset:
    """Returns rows of normal numbers; the label says whether they add up to more than zero."""
    inputs = random.standard_normal((_TRAIN_COUNT + _TEST_COUNT, _FEATURES), np.float32)
    labels = (inputs.sum(axis=1) > 0).astype(np.int32)
    return Dataset(
        "random",
        Split(inputs[:_TRAIN_COUNT], labels[:_TRAIN_COUNT]),
        Split(inputs[_TRAIN_COUNT:], labels[_TRAIN_COUNT:]),
    )


def parameter_rows(wrapped: Any) -> list[list[str]]:
    """Returns a row for each array: its path, its shape, what it trains as, its size."""
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
    options: Options,
    console: Console,
) -> float:
    """Returns the test accuracy after training, be it in full or of adapters."""
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


if __name__ == "__main__":
    sys.exit(main())
