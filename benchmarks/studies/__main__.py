"""Runs studies as a reader does, and stores what they find.

A result is a file in benchmarks/results/studies, with the commands that made it: the metrics.json
of each. What is stored already is not run again, unless it is named. `python -m
benchmarks.documents` puts the tables into the documentation.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.running import as_typed, run_module
from benchmarks.stored import RESULTS, ResultStore
from benchmarks.studies.tables import STUDIES, Call
from experiments.common.console import Console
from experiments.common.errors import exit_code
from experiments.common.options import Parser

# Of what a study has written, paths mean nothing elsewhere.
_PATHS = ("adapter", "model")
_EPILOG = """\
examples:
  python -m benchmarks.studies                  all that are not stored yet
  python -m benchmarks.studies mnist text       these, again
  python -m benchmarks.studies --report images  what is stored
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the studies unless their results are asked for, prints them, returns the exit code."""
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    store, console = ResultStore(options.results), Console()
    stored = store.load_all(list(STUDIES))
    missing = [name for name in STUDIES if name not in stored]
    for name in [] if options.report else options.study or missing:
        folder = options.work / name
        runs = [_numbers_of(call, folder) for call in STUDIES[name].calls]
        commands = [as_typed(call.command(folder)) for call in STUDIES[name].calls]
        store.save(name, {"runs": runs}, commands=commands)
    for name in options.study or list(STUDIES):
        found = store.load(name)
        for table in STUDIES[name].tables(found["runs"]) if found else ():
            table.show(console)
        if found is None:
            console.note(f"{name} is not stored yet")


def _numbers_of(call: Call, folder: Path) -> Any:
    """Calls a study, and returns what it has written."""
    run_module(call.command(folder))
    found = json.loads(call.found_in(folder).read_text(encoding="utf-8"))
    return {name: each for name, each in found.items() if name not in _PATHS}


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.studies", description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "study",
        nargs="*",
        metavar="NAME",
        type=_study,
        help=f"one of {', '.join(STUDIES)} (default: all that are not stored)",
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS / "studies",
        metavar="DIR",
        help="the folder of the results",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/studies"),
        metavar="DIR",
        help="the folder in which the studies run",
    )
    return parser


def _study(name: str) -> str:
    if name not in STUDIES:
        raise argparse.ArgumentTypeError(f"{name!r} is no study; one of {', '.join(STUDIES)}")
    return name


if __name__ == "__main__":
    sys.exit(main())
