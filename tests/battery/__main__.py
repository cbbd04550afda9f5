"""The battery as a command: the rows of the suite, or with --all the whole product."""

import argparse
import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence

from tests.battery.rows import Row, all_rows, suite_rows
from tests.battery.running import Failure
from tests.battery.worker import reasons_against
from tests.progress import with_progress

# Rows that a process takes at once: enough to reuse what the first of them made.
_CHUNK = 60


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    rows = [
        row
        for row in (all_rows() if options.all else suite_rows())
        if re.search(options.only, row.name)
    ]
    if options.list:
        print("\n".join(row.name for row in rows))
        return 0
    if not rows:
        print(f"No row matches {options.only!r}; --list shows their names.", file=sys.stderr)
        return 2
    start = time.monotonic()
    pairs = with_progress(
        _rows_and_reasons(rows, options.processes, options.exit_first), len(rows), unit="rows"
    )
    found = [Failure(row, reason) for row, reason in pairs if reason]
    _print_table(found)
    minutes = (time.monotonic() - start) / 60
    print(f"{len(rows)} rows, {len(found)} failures, {minutes:.1f} min")
    return 1 if found else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.battery",
        description="Runs layouts × ops × options × transforms against the dense weight.",
        epilog="Exit code: 0 if nothing failed, 1 if a row did, 2 if there is nothing to run.",
    )
    parser.add_argument("--all", action="store_true", help="the whole product, about a day")
    parser.add_argument(
        "--only", default="", metavar="EXPRESSION", help="rows whose name this expression matches"
    )
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    parser.add_argument("--exit-first", action="store_true", help="stop at the first failure")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="how many at once (%(default)s)"
    )
    return parser


def _rows_and_reasons(
    rows: Sequence[Row], processes: int | None, exit_first: bool
) -> Iterator[tuple[Row, str]]:
    """Yields each row with what is wrong with it, or an empty text, in no order."""
    chunks = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
    with concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn")
    ) as pool:
        running = {
            pool.submit(reasons_against, [row.name for row in chunk]): chunk for chunk in chunks
        }
        for future in concurrent.futures.as_completed(running):
            reasons = future.result()
            for row, reason in zip(running[future], reasons, strict=True):
                if reason:
                    print(f"\n{Failure(row, reason)}", file=sys.stderr)
                yield row, reason
            if exit_first and any(reasons):
                pool.shutdown(cancel_futures=True)
                return


def _print_table(failures: Sequence[Failure]) -> None:
    """Prints how often each op fails, with the first of its reasons."""
    by_op: dict[str, list[Failure]] = collections.defaultdict(list)
    for failure in failures:
        by_op[f"{failure.row.op.family}.{failure.row.op.name}"].append(failure)
    for name, found in sorted(by_op.items()):
        print(f"{len(found):6d}  {name}")
        for failure in itertools.islice(found, 3):
            print(f"        {failure}")


if __name__ == "__main__":
    sys.exit(main())
