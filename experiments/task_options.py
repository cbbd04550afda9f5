"""The options of every study on the MNIST task: its training, its data and where results go."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from experiments.command import existing_folder, fraction, positive_float, positive_int, seed
from experiments.data.load import CHOICES, Choice


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What the caller chose; `--help` says what each means."""

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


def add_task_options(
    parser: argparse.ArgumentParser, *, replay: float, out: Path, contents: str
) -> None:
    """Adds the options of `TaskOptions`.

    Args:
      parser: where to.
      replay: the default of `--replay`.
      out: the default of `--out`.
      contents: what the study puts there.
    """
    _add_training_options(parser.add_argument_group("training"), replay)
    _add_data_options(parser.add_argument_group("data"))
    _add_output_options(parser.add_argument_group("output"), out, contents)


def _add_training_options(group: argparse._ArgumentGroup, replay: float) -> None:
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
        default=replay,
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


def _add_output_options(group: argparse._ArgumentGroup, out: Path, contents: str) -> None:
    group.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"for {contents}")
    group.add_argument(
        "--json",
        action="store_true",
        help="print the metrics, as JSON and nothing else, to standard output",
    )
    group.add_argument("--no-plots", action="store_true", help="draw no pictures")
