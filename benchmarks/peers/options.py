"""What the command lines of all comparisons share."""

import argparse
import os

from benchmarks.measuring import MeasuringParser
from experiments.common.options import positive_int


def comparison_parser(name: str, description: str | None) -> MeasuringParser:
    """Returns a parser with the options that every comparison has."""
    parser = MeasuringParser(name, description)
    parser.add_argument(
        "--threads", type=_threads, default=_cores(), metavar="N", help="cores of each contender"
    )
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
