"""Fine-tunes SmolLM2-135M-Instruct on DialogSum in every way of a grid, and compares the answers.

The base, which is Q4_1 dequantised, learns to summarise dialogues with LoRA, DoRA, QLoRA and
in full, all on the same 1,000 dialogues, and answers all 500 test dialogues. A small search
gives LoRA and full fine-tuning learning rates of their own. A cell takes up to 50 minutes on
two cores. Each finished cell is a file in benchmarks/results/dialogsum, with the commands that
made it; the command goes on from what is there. After Ctrl-C a cell goes on from its checkpoint.
Seconds of cells that were computed at other times do not compare: --speed measures all together.

A grid of its own, in benchmarks/results/dialogsum_t5, is that of the small T5 that
`python -m experiments.pretrain_t5` leaves: as it is, with LoRA, and fine-tuned in full.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.dialogsum.cells import GRIDS, Grid
from benchmarks.dialogsum.computing import Workplace
from benchmarks.dialogsum.report import tables
from benchmarks.dialogsum.speed import NAME as SPEED
from benchmarks.dialogsum.speed import as_result, timed_steps
from benchmarks.stored import RESULTS, ResultStore
from experiments.common.console import Console
from experiments.common.errors import InputError, check_installed, exit_code
from experiments.common.options import Parser, positive_int

_MODULE = "benchmarks.dialogsum"
_EPILOG = """\
examples:
  python -m benchmarks.dialogsum                           all that is missing, several hours
  python -m benchmarks.dialogsum --only base --only lora-8
  python -m benchmarks.dialogsum --report                  nothing is computed
  python -m benchmarks.dialogsum --speed                   ten minutes
  python -m benchmarks.dialogsum --grid t5                 half an hour
  python -m benchmarks.dialogsum --model path/to/another-model --results results/another
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Computes what is missing, prints the tables, and returns the exit code."""
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    grid = GRIDS[options.grid]
    console, store = Console(), ResultStore(options.results or RESULTS / grid.results)
    if options.speed:
        _measure(options, grid, store, console)
    elif not options.report:
        check_installed("rouge_score", "lora-jax[llm]")
        _compute(options, grid, store, console)
    found = store.load_all([*grid.cells, SPEED])
    for table in tables(grid, found):
        table.show(console)
    if options.picture:
        # Matplotlib takes half a second to import, which other calls save.
        from benchmarks.dialogsum.picture import save_picture

        save_picture(options.picture, grid, found)


def _compute(options: argparse.Namespace, grid: Grid, store: ResultStore, console: Console) -> None:
    wanted = options.only or list(grid.cells)
    others = sorted(set(wanted) - set(grid.cells))
    if others:
        raise InputError(f"--only {others[0]} is no cell of the grid; {_choices(grid)}")
    found = store.load_all(list(grid.cells))
    missing = [cell for name, cell in grid.cells.items() if name in wanted and name not in found]
    console.note(f"{len(wanted) - len(missing)} of {len(wanted)} cells are in {store.folder}")
    console.table(
        ["to compute", "minutes on two cores"],
        [[cell.label, f"{grid.expected_minutes(cell):.0f}"] for cell in missing],
    )
    folder = options.work or Path("runs") / grid.results
    workplace = Workplace(folder, store, options.model or grid.model, tuple(options.study))
    for number, cell in enumerate(missing, start=1):
        console.rule(f"{number} of {len(missing)}: {cell.label}")
        workplace.compute(cell, store.load_all(list(grid.cells)))


def _measure(options: argparse.Namespace, grid: Grid, store: ResultStore, console: Console) -> None:
    if options.only:
        raise InputError("--only chooses cells, and --speed measures all methods; pass one of them")
    found = timed_steps(
        grid,
        rounds=options.rounds,
        model=options.model or grid.model,
        options=options.study,
        console=console,
    )
    command = ["python", "-m", _MODULE, "--grid", options.grid, "--speed"]
    command += ["--rounds", str(options.rounds)]
    command += ["--model", str(options.model)] if options.model else []
    command += ["--", *options.study] if options.study else []
    store.save(SPEED, as_result(found), commands=[shlex.join(command)])


def _choices(grid: Grid) -> str:
    return f"one of {', '.join(grid.cells)}"


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.dialogsum", description=__doc__, epilog=_EPILOG)
    parser.add_argument("--grid", choices=list(GRIDS), default="smollm2", help="which cells")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="another model than that of the grid, as `llm_lora` takes it",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="CELL",
        help="a cell to compute (repeatable; default: all that are missing): "
        + "; ".join(f"{_choices(grid)} of {name}" for name, grid in GRIDS.items()),
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="the folder of finished cells (default: that of the grid in benchmarks/results)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="the folder of adapters and checkpoints (default: that of the grid in runs)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--speed",
        action="store_true",
        help="measure instead how fast each method trains, a step of each in turn, and its memory",
    )
    instead.add_argument("--report", action="store_true", help="compute nothing")
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=10,
        help="of --speed: how many steps each takes",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw ROUGE as a PNG")
    parser.add_argument(
        "study",
        nargs="*",
        metavar="OPTION",
        help="after --, options of `python -m experiments.llm_lora` for every training",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
