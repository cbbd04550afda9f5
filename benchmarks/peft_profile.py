"""Where the time of a training step goes, ours and PEFT's, for the study on language models.

The contenders of benchmarks.peft_llm take the same steps, one contender after the other, JAX's
under its profiler and PyTorch's with each operation timed, which costs some time itself. On a CPU,
and nothing else should run on it. What XLA merges into one operation counts as the kind of its last
part; PyTorch's operations are told apart by their names and the sizes of what they take.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measuring import MeasuringParser, write_found
from benchmarks.peers.contender import versions
from benchmarks.peers.llm_comparison import (
    TRAINING,
    check_compared,
    llm_parser,
    remote,
    write_start,
)
from benchmarks.peers.xla_profile import KINDS
from experiments.common.console import Console
from experiments.common.errors import InputError, exit_code
from experiments.common.options import positive_int
from experiments.common.tables import Table

# The first steps find no memory that another has left.
_BEFORE = 2
_EPILOG = """\
examples:
  python -m benchmarks.peft_profile
  python -m benchmarks.peft_profile --steps 10 -- --data my.jsonl --max-length 256 --rank 16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, and returns the exit code."""
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    check_compared(options)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        console.note("Preparing the model, the examples and the adapter")
        steps = len(write_start(folder, options, steps=_BEFORE + options.steps, prompts=1))
        if steps <= _BEFORE:
            raise InputError(
                f"steps of the training: {steps}; expected more than the {_BEFORE} that come "
                "before those that are profiled: more --train-examples or --epochs"
            )
        found: dict[str, Any] = {
            "threads": options.threads,
            "steps": steps - _BEFORE,
            "contenders": _profiled(folder, steps, options, console),
        }
    found["versions"] = versions(found["contenders"].values())
    for table in tables(found):
        table.show(console)
    write_found(options, found)


def _profiled(
    folder: str, steps: int, options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Returns the seconds of each kind in all steps but the first, and the versions, of each."""
    found = {}
    with console.progress("Taking steps", len(TRAINING)) as progress:
        for name, (target, arguments) in TRAINING.items():
            own = remote(target, options, folder=folder, **arguments)
            with contextlib.closing(own):
                own.call("begin")
                own.call("warm_up")
                own.call("steps", first=0, count=_BEFORE)
                seconds = own.call("profile", first=_BEFORE, count=steps - _BEFORE)
                found[name] = {"seconds": seconds, "versions": own.call("versions")}
            progress.advance()
    return found


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Returns what `--json` writes, as a table."""
    contenders, steps = found["contenders"], found["steps"]
    seconds = {name: each["seconds"] for name, each in contenders.items()}
    rows = [[kind, *(f"{own[kind] / steps:.2f}" for own in seconds.values())] for kind in KINDS]
    rows.append(["all", *(f"{sum(own.values()) / steps:.2f}" for own in seconds.values())])
    title = f"Seconds of a step, under a profiler, threads: {found['threads']}, steps: {steps}"
    return [Table(title, ["", *contenders], rows)]


def _parser() -> MeasuringParser:
    parser = llm_parser("peft_profile", __doc__, _EPILOG)
    parser.add_argument(
        "--steps", type=positive_int, default=5, metavar="N", help="steps to profile at most"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
