"""How a study ends: with which error, which one line on it, and which exit code."""

import contextlib
import importlib
import importlib.util
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class InputError(Exception):
    """An argument, a file or a folder that the caller has to change."""


def exit_code(study: Callable[[], None]) -> int:
    """Runs the study and returns the exit code of the process; an error is one line."""
    try:
        with _remembered_interrupts():
            study()
    except SystemExit as exit_request:  # argparse: wrong arguments, or --help
        return exit_request.code if isinstance(exit_request.code, int) else EXIT_FAILURE
    except InputError as error:
        return _reported(str(error), EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        return _reported("interrupted; what was finished is kept", EXIT_INTERRUPTED)
    except (OSError, ValueError, RuntimeError) as error:
        return _reported(f"{type(error).__name__}: {error}", EXIT_FAILURE)
    return EXIT_OK


def _reported(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


@contextlib.contextmanager
def as_input_error() -> Iterator[None]:
    """Turns an argument that the library refuses within the block into an `InputError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def needed_module(name: str, source: str) -> ModuleType:
    """Returns a module that only some studies need.

    Args:
      name: its name.
      source: what pip installs it from: a requirement, or `--group` and a group's name.

    Raises:
      InputError: it is not installed; the message says what installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _missing(error.name, source) from error


def check_installed(name: str, source: str) -> None:
    """Raises like `needed_module`, without importing anything."""
    if importlib.util.find_spec(name) is None:
        raise _missing(name, source)


def _missing(name: str | None, source: str) -> InputError:
    command = shlex.join(["pip", "install", *source.split()])
    return InputError(f"{name} is not installed, and this study needs it: {command}")


_interrupt_requested = threading.Event()


def raise_if_interrupted() -> None:
    """Raises KeyboardInterrupt after a Ctrl-C, even if Python dropped the first exception."""
    if _interrupt_requested.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Lets a Ctrl-C within the block take effect at its end."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or not _in_main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for number, frame in held[:1]:
            handler(number, frame)


@contextlib.contextmanager
def _remembered_interrupts() -> Iterator[None]:
    """Lets `raise_if_interrupted` know of every Ctrl-C within the block.

    Python drops an exception that is raised in a callback of its garbage collector, and JAX has a
    callback that runs often.
    """
    # Another handler was chosen by someone, such as a background job that ignores Ctrl-C.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _in_main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _remember_and_raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _interrupt_requested.clear()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _remember_and_raise(number: int, frame: FrameType | None) -> None:
    _interrupt_requested.set()
    signal.default_int_handler(number, frame)
