"""Fine-tunes SmolLM2-135M-Instruct on DialogSum in every way of a grid, and compares the answers.

The base, which is Q4_1 dequantised, learns to summarise dialogues with LoRA, DoRA, QLoRA and
in full, all on the same 1,000 dialogues, and answers all 500 test dialogues. A small search
gives LoRA and full fine-tuning learning rates of their own. A cell takes up to 50 minutes on
two cores. Each finished cell is a file in benchmarks/results/dialogsum, with the commands that
made it; the command goes on from what is there. After Ctrl-C a cell goes on from its checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.dialogsum.cells import CELLS
from benchmarks.dialogsum.computing import Workplace
from benchmarks.dialogsum.report import tables
from benchmarks.stored import RESULTS, ResultStore
from experiments.common.console import Console
from experiments.common.errors import check_installed, exit_code
from experiments.common.options import Parser

_EPILOG = """\
examples:
  python -m benchmarks.dialogsum                           all that is missing, several hours
  python -m benchmarks.dialogsum --only base --only lora-8
  python -m benchmarks.dialogsum --report --markdown       nothing is computed
  python -m benchmarks.dialogsum -- --model path/to/another-model
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Computes what is missing, prints the tables, and returns the exit code."""
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    console, store = Console(), ResultStore(options.results or RESULTS / "dialogsum")
    if not options.report:
        check_installed("rouge_score", "llm")
        _compute(options, store, console)
    found = store.load_all(list(CELLS))
    for table in tables(found):
        if options.markdown:
            print(table.as_markdown())
        else:
            table.show(console)
    if options.picture:
        # Matplotlib takes half a second to import, which other calls save.
        from benchmarks.dialogsum.picture import save_picture

        save_picture(options.picture, found)


def _compute(options: argparse.Namespace, store: ResultStore, console: Console) -> None:
    wanted = options.only or list(CELLS)
    found = store.load_all(list(CELLS))
    missing = [cell for name, cell in CELLS.items() if name in wanted and name not in found]
    console.note(f"{len(wanted) - len(missing)} of {len(wanted)} cells are in {store.folder}")
    console.table(
        ["to compute", "minutes on two cores"],
        [[cell.label, f"{cell.expected_minutes:.0f}"] for cell in missing],
    )
    workplace = Workplace(options.work, store, tuple(options.study))
    for number, cell in enumerate(missing, start=1):
        console.rule(f"{number} of {len(missing)}: {cell.label}")
        workplace.compute(cell, store.load_all(list(CELLS)))


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.dialogsum", description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--only",
        action="append",
        choices=list(CELLS),
        metavar="CELL",
        help=f"a cell to compute (repeatable; default: all that are missing): {', '.join(CELLS)}",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="the folder of finished cells (default: benchmarks/results/dialogsum)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/dialogsum"),
        metavar="DIR",
        help="the folder of adapters and checkpoints",
    )
    parser.add_argument("--report", action="store_true", help="compute nothing")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
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
