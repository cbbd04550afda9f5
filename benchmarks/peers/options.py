"""What the command lines of both comparisons share."""

import argparse
import os
from pathlib import Path

from experiments.common.options import Parser, positive_int


def comparison_parser(name: str, description: str | None) -> Parser:
    """Returns a parser with the options that every comparison has."""
    parser = Parser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument(
        "--threads", type=_threads, default=_cores(), metavar="N", help="cores of each contender"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    return parser


def _cores() -> int:
    """Returns how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _threads(text: str) -> int:
    count = int(positive_int(text))
    if count > _cores():
        raise argparse.ArgumentTypeError(f"{text!r} is more than the {_cores()} cores there are")
    return count
