"""Ctrl-C that is not lost."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_requested = threading.Event()


@contextlib.contextmanager
def remembered_interrupts() -> Iterator[None]:
    """Has `raise_if_interrupted` raise, within the block, for every Ctrl-C that Python lost.

    Python drops an exception that comes up in a callback of its garbage collector, and JAX has one
    that runs often.
    """
    # Another handler is somebody's choice, as with a job in the background that ignores Ctrl-C.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _in_main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _remember_and_raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _requested.clear()


def raise_if_interrupted() -> None:
    if _requested.is_set():
        raise KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _remember_and_raise(number: int, frame: FrameType | None) -> None:
    _requested.set()
    signal.default_int_handler(number, frame)
