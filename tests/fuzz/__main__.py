"""The generator as a command."""

import argparse
import sys
import time
from collections.abc import Sequence

from tests import conftest as _settings  # noqa: F401 - JAX as the tests have it
from tests.fuzz.running import failures
from tests.progress import with_progress


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    cases = [options.case] if options.case is not None else range(options.cases)
    start = time.monotonic()
    done = failed = 0
    for _, text in with_progress(failures(options.seed, cases), len(cases), unit="cases"):
        done += 1
        failed += bool(text)
        if text:
            print(f"\n{text}", flush=True)
        if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
            break
        if options.exit_first and failed:
            break
    minutes = (time.monotonic() - start) / 60
    print(f"{done} cases from seed {options.seed}, {failed} failures, {minutes:.1f} min")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Random programs, adapted and compared with the dense weights in float64.",
        epilog="Exit code: 0 if nothing failed, 1 if a case did.",
    )
    parser.add_argument("--cases", type=int, default=1000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which programs (%(default)s)")
    parser.add_argument("--case", type=int, help="only the case of this number")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--exit-first", action="store_true", help="stop at the first failure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
