"""A progress bar on a terminal, and lines now and then elsewhere, for the tests' own commands."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")
_WIDTH = 30


def with_progress(items: Iterable[_T], total: int, *, unit: str) -> Iterator[_T]:
    """Yields the items, and shows how many there were, of how many, and how long the rest takes."""
    start = shown = time.monotonic()
    is_terminal = sys.stderr.isatty()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if done != total and now - shown < (0.2 if is_terminal else 60):
            continue
        shown = now
        left = (now - start) / done * (total - done)
        bar = "#" * (_WIDTH * done // max(total, 1))
        line = f"[{bar:<{_WIDTH}}] {done}/{total} {unit}, {left / 60:.0f} min left"
        print(
            f"\r{line}" if is_terminal else line, end="" if is_terminal else "\n", file=sys.stderr
        )
    if is_terminal:
        print(file=sys.stderr)
