"""The command line of `rank_study`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from experiments.common.options import Option, parsed_as, positive_float, positive_int
from experiments.common.shared_options import FolderOptions
from experiments.mnist.options import DataOptions, TrainingOptions
from experiments.ranks.methods import METHODS

_DESCRIPTION = """\
Which rank, and which variant of LoRA?

The network of mnist_lora, 784-1000-2000-10 and pretrained for one epoch, is fine-tuned
on the digit that it gets wrong most often: once for each rank, variant and repetition.
The tables and the picture show the wrong answers on that digit, the accuracy on all
digits, the trainable numbers and the time of a training step.

  lora       the paper's: scale alpha/r, lora_B starts at zero
  rslora     scale alpha/sqrt(r), so that high ranks learn as fast as low ones
  dora       the adapter turns the weights of each output; their length trains separately
  pissa      the factors start as the weight's leading singular vectors
  lora_plus  lora_B learns faster than lora_A: 16 times, unless --lora-plus-ratio differs

Half of each batch shows other digits (--replay); otherwise the accuracy on all digits
would only tell how fast a variant forgets them. All variants and ranks see the same
batches. The output layer has ten columns, so its rank is at most ten.

Every finished cell of the grid is stored at once. After Ctrl-C or a crash, the same
command continues where it stopped; cells of other settings are never reused.
"""

_EXAMPLES = """\
examples:
  python -m experiments.rank_study                            the whole grid, some minutes
  python -m experiments.rank_study --ranks 1 4 16 --methods lora dora --repeats 1
  python -m experiments.rank_study --alpha 4                  adapters that count four times
  python -m experiments.rank_study --data digits --json | jq '.cells[].accuracy'
"""


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Which fine-tunings to compare."""

    ranks: Annotated[
        tuple[int, ...],
        Option("the ranks r to compare", positive_int, several=True, metavar="RANK"),
    ] = (1, 2, 4, 8, 16, 32)
    methods: Annotated[
        tuple[str, ...],
        Option(
            f"the variants to compare, of {', '.join(METHODS)}",
            several=True,
            choices=tuple(METHODS),
            metavar="METHOD",
        ),
    ] = tuple(METHODS)
    repeats: Annotated[
        int,
        Option(
            "fine-tunings of each cell; they differ in batches and in the factors' start",
            positive_int,
        ),
    ] = 3
    alpha: Annotated[
        float,
        Option(
            "the same for all ranks, so that the scale falls as r rises: alpha/r or alpha/sqrt(r)",
            positive_float,
        ),
    ] = 1.0
    lora_plus_ratio: Annotated[
        float,
        Option(
            "the learning rate of lora_B in lora_plus, in multiples of lora_A's",
            positive_float,
            metavar="RATIO",
        ),
    ] = 16.0
    base: Annotated[
        Path,
        Option(
            "a base network of another run, used if its settings are the same", Path, metavar="DIR"
        ),
    ] = Path("runs/mnist_lora/base_checkpoint")
    fresh: Annotated[
        bool,
        Option("compute the finished cells of these settings again, as after a change of the code"),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller chose; `--help` says what each means."""

    grid: GridOptions = GridOptions()
    training: TrainingOptions = TrainingOptions(replay=0.5)
    data: DataOptions = DataOptions()
    output: FolderOptions = FolderOptions(out=Path("runs/rank_study"))


def parsed(arguments: Sequence[str] | None) -> Options:
    """Returns the options on the command line; exits, as argparse does, if one is wrong."""
    chosen = parsed_as(
        Options, arguments, command="rank_study", description=_DESCRIPTION, examples=_EXAMPLES
    )
    grid = dataclasses.replace(
        chosen.grid,
        ranks=tuple(sorted(set(chosen.grid.ranks))),
        methods=tuple(method for method in METHODS if method in chosen.grid.methods),
    )
    return dataclasses.replace(chosen, grid=grid)
