"""The command line of `mnist_lora`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.command import Parser
from experiments.mnist_task import LAYERS
from experiments.task_options import TaskOptions, add_task_options

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


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    """What the caller chose; `--help` says what each means."""

    rank: int
    alpha: float
    targets: Sequence[str]


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
    )
    _add_adapter_options(options.add_argument_group("adapters"))
    add_task_options(
        options,
        replay=0.0,
        out=Path("runs/mnist_lora"),
        contents="metrics.json, the pictures and the two checkpoints",
    )
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
        default=list(LAYERS),
        metavar="EXPRESSION",
        help="the layers to adapt: regular expressions that match names in a weight's path",
    )
