"""The options that several studies have, so that a study writes `batch_size: BatchSize = 10`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax

import lora_jax
from experiments.common.errors import as_input_error
from experiments.common.options import (
    Option,
    fraction,
    not_negative,
    positive_float,
    positive_int,
    seed_number,
)

Rank = Annotated[
    int,
    Option(
        "r: columns of lora_A and rows of lora_B; a kernel (in, out) gets r·(in + out) trainable "
        "numbers",
        type=positive_int,
    ),
]
Alpha = Annotated[
    float | None,
    Option("the adapters are scaled by alpha/rank (default: the rank, so by 1)", positive_float),
]
Targets = Annotated[
    tuple[str, ...],
    Option(
        "the layers to adapt: regular expressions that match names in a weight's path",
        several=True,
        metavar="EXPRESSION",
    ),
]
Epochs = Annotated[int, Option("passes over the training examples", positive_int)]
BatchSize = Annotated[int, Option("examples in a step", positive_int)]
LearningRate = Annotated[float, Option("Adam's, in both trainings", positive_float)]
Warmup = Annotated[
    float,
    Option(
        "the share of steps in which the learning rate rises; then it falls to 0",
        fraction,
        metavar="FRACTION",
    ),
]
WeightDecay = Annotated[float, Option("AdamW's", not_negative)]
EvaluateEvery = Annotated[
    int,
    Option(
        "how often to test on the held-out examples, and to leave a checkpoint",
        positive_int,
        metavar="STEPS",
    ),
]
Resume = Annotated[bool, Option("continue the training that --out holds")]
Seed = Annotated[int, Option("decides every random number", seed_number)]
DataDir = Annotated[
    Path | None,
    Option(
        "where TensorFlow Datasets keeps prepared data (default: its own folder, "
        "~/tensorflow_datasets)",
        Path,
    ),
]


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Which layers get adapters, and of what size."""

    rank: Rank = 1
    alpha: Alpha = None
    targets: Targets

    def wrapped(self, params: Any, *, seed: int, **settings: Any) -> Any:
        """Returns `params` with these adapters; `settings` go to `lora_jax.wrap` as well.

        Raises:
          InputError: `lora_jax.wrap` refuses a setting; its message says why.
        """
        with as_input_error():
            return lora_jax.wrap(
                params,
                self.targets,
                rank=self.rank,
                alpha=self.alpha,
                key=jax.random.key(seed),
                **settings,
            )


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How a study that writes no files shows its results."""

    json: Annotated[
        bool, Option("print the results, as JSON and nothing else, to standard output")
    ] = False


@dataclass(frozen=True, kw_only=True)
class FolderOptions(OutputOptions):
    """How a study shows its results, and where it writes them."""

    out: Annotated[
        Path,
        Option(
            "the folder for metrics, pictures and what a later run uses again", Path, metavar="DIR"
        ),
    ]
    no_plots: Annotated[bool, Option("draw no pictures")] = False
