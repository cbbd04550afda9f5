"""Runs the study on images, stores what it finds, and prints it as the documentation has it.

The result is a file in benchmarks/results/images, with the command that made it. The base that an
earlier run has trained is used again. An hour on two cores.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, ResultStore
from benchmarks.tables import Table
from experiments.common.console import Console
from experiments.common.errors import EXIT_INTERRUPTED, EXIT_OK, exit_code
from experiments.common.memory import MEGABYTE
from experiments.common.options import Parser

NAME = "full"
_STUDY = "experiments.image_lora"
_EPILOG = """\
examples:
  python -m benchmarks.images                      run, store and print
  python -m benchmarks.images --report --markdown  print what is stored
"""
_COSTS = {"lora": "LoRA", "full": "full fine-tuning"}

Found = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study unless its results are asked for, prints them, and returns the exit code."""
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    store = ResultStore(options.results)
    if not options.report:
        _compute(options, store)
    found = store.load(NAME)
    for table in tables(found) if found else ():
        if options.markdown:
            print(table.as_markdown())
        else:
            table.show(Console())


def _compute(options: argparse.Namespace, store: ResultStore) -> None:
    command = [*options.study, "--out", str(options.out)]
    code = subprocess.run([sys.executable, "-m", _STUDY, *command], check=False).returncode
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code != EXIT_OK:
        raise RuntimeError(f"{shlex.join([_STUDY, *command])} ended with {code}")
    found = json.loads((options.out / "metrics.json").read_text(encoding="utf-8"))
    store.save(NAME, found, commands=[shlex.join(["python", "-m", _STUDY, *command])])


def tables(found: Found) -> list[Table]:
    """Returns how much of what was drawn is recognised, and what learning it cost."""
    return [_recognised(found), _costs(found)]


def _recognised(found: Found) -> Table:
    held_out = [str(digit) for digit in found["base"]["held_out"]]
    rows = []
    for name, shares in found["recognised"].items():
        others = [share for digit, share in shares.items() if digit not in held_out]
        own = [f"{shares[digit]:.0%}" for digit in held_out]
        rows.append([name, *own, f"{sum(others) / len(others):.0%}"])
    title = f"Recognised by a classifier that is right on {found['classifier_accuracy']:.1%}"
    return Table(title, ["", *(f"{digit}, held out" for digit in held_out), "the others"], rows)


def _costs(found: Found) -> Table:
    header = ["", "trainable", "seconds", "memory of a step", "stored"]
    return Table("What learning a digit costs", header, list(_cost_rows(found)))


def _cost_rows(found: Found) -> Iterator[list[str]]:
    for digit, costs in found["costs"].items():
        for name, cost in costs.items():
            stored = (
                found["adapter_bytes"][digit]["diffusers"]
                if name == "lora"
                else 4 * found["base_parameters"]
            )
            yield [
                f"{digit}, {_COSTS[name]}",
                f"{cost['trainable']:,}",
                f"{cost['seconds']:.0f}",
                f"{cost['step_bytes'] / MEGABYTE:,.0f} MB",
                f"{stored / MEGABYTE:,.1f} MB",
            ]


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.images", description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS / "images",
        metavar="DIR",
        help="the folder of the result",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/image_lora"),
        metavar="DIR",
        help="the study's folder",
    )
    parser.add_argument("--report", action="store_true", help="compute nothing")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument(
        "study", nargs="*", metavar="OPTION", help=f"after --, options of `python -m {_STUDY}`"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
