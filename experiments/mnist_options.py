"""The command line of `mnist_lora`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.command import (
    HelpFormatter,
    Parser,
    existing_folder,
    fraction,
    positive_float,
    positive_int,
    seed,
)
from experiments.data.load import CHOICES, Choice

_DESCRIPTION = """\
LoRA on MNIST, from beginning to end.

A deliberately oversized network, 784-1000-2000-10, is trained for one epoch. The
digit that it gets wrong most is picked out. All its weights are frozen, and rank-1
adapters are put beside the three kernels: 6,794 trainable numbers next to 2,807,010
frozen ones. The adapters alone are fine-tuned, on that digit alone. Then every claim
is checked: the frozen weights did not change, the adapters come off without a trace,
merged weights cost nothing extra, and the adapters' checkpoint is small.
"""

_EXAMPLES = """\
examples:
  python -m experiments.mnist_lora --rank 1
  python -m experiments.mnist_lora --rank 1 --replay 0.5      keep the other digits
  python -m experiments.mnist_lora --rank 4 --alpha 8 --digit 3 --targets hidden_2 output
  python -m experiments.mnist_lora --data digits --json | jq .adapted
"""


@dataclass(frozen=True)
class Options:
    """What the caller chose; `--help` says what each means."""

    rank: int
    alpha: float
    targets: Sequence[str]
    digit: int | None
    replay: float
    seed: int
    batch_size: int
    pretrain_epochs: int
    finetune_batches: int
    learning_rate: float
    retrain: bool
    data: Choice
    data_dir: Path | None
    mnist_dir: Path | None
    out: Path
    json: bool
    no_plots: bool


def parsed(argv: Sequence[str] | None) -> Options:
    """Returns the options on the command line; exits, as argparse does, where one is wrong."""
    values = vars(_parser().parse_args(argv))
    if values["alpha"] is None:
        values["alpha"] = float(values["rank"])
    return Options(**values)


def _parser() -> Parser:
    options = Parser(
        prog="python -m experiments.mnist_lora",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    _add_adapter_options(options.add_argument_group("adapters"))
    _add_training_options(options.add_argument_group("training"))
    _add_data_options(options.add_argument_group("data"))
    _add_output_options(options.add_argument_group("output"))
    return options


def _add_adapter_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rank",
        type=int,
        default=1,
        help="r: columns of lora_A and rows of lora_B; a kernel (in, out) gets r·(in + out) "
        "trainable numbers",
    )
    group.add_argument(
        "--alpha",
        type=float,
        default=None,
        help="the adapters count alpha/rank times (default: the rank, so once)",
    )
    group.add_argument(
        "--targets",
        nargs="+",
        default=["hidden_1", "hidden_2", "output"],
        metavar="EXPRESSION",
        help="the layers to adapt: regular expressions that match names in a weight's path",
    )


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--digit",
        type=int,
        choices=range(10),
        default=None,
        metavar="0-9",
        help="the digit to fine-tune on (default: the one that the network gets wrong most)",
    )
    group.add_argument(
        "--replay",
        type=fraction,
        default=0.0,
        metavar="FRACTION",
        help="the fraction of other digits mixed into fine-tuning; with 0 the network unlearns "
        "them, with 0.5 it keeps most of them, and 0.9 shows all digits alike",
    )
    group.add_argument("--seed", type=seed, default=0, help="decides every random number")
    group.add_argument("--batch-size", type=positive_int, default=10, help="images in a step")
    group.add_argument(
        "--pretrain-epochs", type=positive_int, default=1, help="passes over the training images"
    )
    group.add_argument(
        "--finetune-batches", type=positive_int, default=100, help="steps of fine-tuning"
    )
    group.add_argument(
        "--learning-rate", type=positive_float, default=1e-3, help="Adam's, in both trainings"
    )
    group.add_argument(
        "--retrain",
        action="store_true",
        help="pretrain again, even where --out has a base network of the same settings",
    )


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        choices=CHOICES,
        default="auto",
        help="mnist; digits (scikit-learn's 1,797 small images, no download); or auto: mnist if "
        "it can be had, digits otherwise",
    )
    group.add_argument(
        "--data-dir",
        type=Path,
        default=None,
        help="where TensorFlow Datasets keeps prepared data (default: its own folder, "
        "~/tensorflow_datasets)",
    )
    group.add_argument(
        "--mnist-dir",
        type=existing_folder,
        default=None,
        help="a folder with MNIST's four IDX .gz files, to prepare from without a network "
        "(default: the variable MNIST_DIR)",
    )


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        type=Path,
        default=Path("runs/mnist_lora"),
        metavar="DIR",
        help="for metrics.json, the pictures and the two checkpoints",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="print the metrics, as JSON and nothing else, to standard output",
    )
    group.add_argument("--no-plots", action="store_true", help="draw no pictures")
