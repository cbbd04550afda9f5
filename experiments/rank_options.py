"""The command line of `rank_study`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.command import Parser, positive_float, positive_int
from experiments.rank_methods import METHODS
from experiments.task_options import TaskOptions, add_task_options

_DESCRIPTION = """\
Which rank, and which variant of LoRA?

The network of mnist_lora, 784-1000-2000-10 and pretrained for one epoch, is fine-tuned
on the digit that it gets wrong most: once for every rank, every variant and every
repetition. The table and the picture show the wrong answers on that digit, the accuracy
on all digits, the trainable numbers and the time of a training step.

  lora       the paper's: scale alpha/r, lora_B starts at zero
  rslora     scale alpha/sqrt(r), so that high ranks learn as fast as low ones
  dora       the adapter turns each output's weights; their length trains by itself
  pissa      the factors start as the weight's leading singular vectors
  lora_plus  lora_B learns faster than lora_A: 16 times, unless --lora-plus-ratio differs

Half of each batch shows other digits (--replay), since the accuracy on all digits would
otherwise only say how fast a variant forgets them. All variants and ranks see the same
batches. The output layer has ten columns, and no higher rank than that.

Every finished cell of the grid is stored at once. After Ctrl-C, or a crash, the same
command goes on where it was; changed settings never meet the cells of others.
"""

_EXAMPLES = """\
examples:
  python -m experiments.rank_study                            the whole grid, some minutes
  python -m experiments.rank_study --ranks 1 4 16 --methods lora dora --repeats 1
  python -m experiments.rank_study --alpha 4                  adapters that count four times
  python -m experiments.rank_study --data digits --json | jq '.cells[].accuracy'
"""


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    """What the caller chose; `--help` says what each means."""

    ranks: Sequence[int]
    methods: Sequence[str]
    repeats: int
    alpha: float
    lora_plus_ratio: float
    base: Path
    fresh: bool


def parsed(argv: Sequence[str] | None) -> Options:
    """Returns the options on the command line; exits, as argparse does, where one is wrong."""
    values = vars(_parser().parse_args(argv))
    values["ranks"] = tuple(sorted(set(values["ranks"])))
    values["methods"] = tuple(method for method in METHODS if method in values["methods"])
    return Options(**values)


def _parser() -> Parser:
    options = Parser(
        prog="python -m experiments.rank_study",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    _add_grid_options(options.add_argument_group("grid"))
    add_task_options(
        options,
        replay=0.5,
        out=Path("runs/rank_study"),
        contents="metrics.json, the picture, the finished cells and the base network",
    )
    return options


def _add_grid_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ranks",
        type=positive_int,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32],
        metavar="RANK",
        help="the ranks r to compare",
    )
    group.add_argument(
        "--methods",
        choices=tuple(METHODS),
        nargs="+",
        default=list(METHODS),
        metavar="METHOD",
        help=f"the variants to compare, of {', '.join(METHODS)}",
    )
    group.add_argument(
        "--repeats",
        type=positive_int,
        default=3,
        help="fine-tunings of each cell; they differ in batches and in the factors' start",
    )
    group.add_argument(
        "--alpha",
        type=positive_float,
        default=1.0,
        help="the same for all ranks, so that scale falls as r rises: alpha/r or alpha/sqrt(r)",
    )
    group.add_argument(
        "--lora-plus-ratio",
        type=positive_float,
        default=16.0,
        metavar="RATIO",
        help="how many times lora_A's learning rate lora_B has in lora_plus",
    )
    group.add_argument(
        "--base",
        type=Path,
        default=Path("runs/mnist_lora/base_checkpoint"),
        metavar="DIR",
        help="a base network of another run, to be used if its settings are the same",
    )
    group.add_argument(
        "--fresh",
        action="store_true",
        help="forget the finished cells of these settings, as after a change of the code",
    )
