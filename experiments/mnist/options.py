"""The command line of `mnist_lora`, with the options of every study on its task."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from experiments.common.console import Console
from experiments.common.options import Option, existing_folder, fraction, parsed_as, positive_int
from experiments.common.shared_options import (
    AdapterOptions,
    BatchSize,
    DataDir,
    FolderOptions,
    LearningRate,
    Seed,
)
from experiments.data.dataset import Dataset
from experiments.data.images import CHOICES, Choice, load_images
from experiments.mnist.network import LAYERS

_DESCRIPTION = """\
LoRA on MNIST, from beginning to end.

A deliberately oversized network, 784-1000-2000-10, is trained for one epoch. The
digit that it gets wrong most often is picked out. All its weights are frozen, and
rank-1 adapters are put beside the three kernels: 6,794 trainable numbers next to
2,807,010 frozen ones. Only the adapters are fine-tuned, and only on that digit. Then
every claim is checked: the frozen weights did not change, the adapters come off
without a trace, merged weights cost nothing extra, and the adapters' checkpoint is
small.
"""

_EXAMPLES = """\
examples:
  python -m experiments.mnist_lora --rank 1
  python -m experiments.mnist_lora --rank 1 --replay 0.5      keep the other digits
  python -m experiments.mnist_lora --rank 4 --alpha 8 --digit 3 --targets hidden_2 output
  python -m experiments.mnist_lora --data digits --json | jq .adapted
"""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the network is pretrained, and how it is fine-tuned on one digit."""

    digit: Annotated[
        int | None,
        Option(
            "the digit to fine-tune on (default: the one that the network gets wrong most often)",
            int,
            choices=range(10),
            metavar="0-9",
        ),
    ] = None
    replay: Annotated[
        float,
        Option(
            "the fraction of other digits mixed into fine-tuning; with 0 the network unlearns "
            "them, with 0.5 it keeps most of them, and with 0.9 all digits are shown alike",
            fraction,
            metavar="FRACTION",
        ),
    ] = 0.0
    seed: Seed = 0
    batch_size: BatchSize = 10
    pretrain_epochs: Annotated[int, Option("passes over the training images", positive_int)] = 1
    finetune_batches: Annotated[int, Option("steps of fine-tuning", positive_int)] = 100
    learning_rate: LearningRate = 1e-3
    retrain: Annotated[
        bool, Option("pretrain again, even if --out has a base network of the same settings")
    ] = False


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the images come from."""

    data: Annotated[
        Choice,
        Option(
            "mnist; digits (scikit-learn's 1,797 small images, no download); or auto: mnist if it "
            "is available, digits otherwise",
            choices=CHOICES,
        ),
    ] = "auto"
    data_dir: DataDir = None
    mnist_dir: Annotated[
        Path | None,
        Option(
            "a folder with MNIST's four IDX .gz files, to prepare it from without a network "
            "(default: the variable MNIST_DIR)",
            existing_folder,
        ),
    ] = None

    def loaded(self, console: Console) -> Dataset:
        return load_images(self.data, self.data_dir, self.mnist_dir, console)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller chose; `--help` says what each means."""

    adapters: AdapterOptions = AdapterOptions(rank=1, targets=LAYERS)
    training: TrainingOptions = TrainingOptions()
    data: DataOptions = DataOptions()
    output: FolderOptions = FolderOptions(out=Path("runs/mnist_lora"))


def parsed(arguments: Sequence[str] | None) -> Options:
    """Returns the options on the command line; exits, as argparse does, if one is wrong."""
    return parsed_as(
        Options, arguments, command="mnist_lora", description=_DESCRIPTION, examples=_EXAMPLES
    )
