"""What every study's command line shares: argument types, one-line errors, exit codes."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from experiments.errors import InputError
from experiments.interrupts import remembered_interrupts

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's paragraphs, and tells each option's default where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        help_text = action.help or ""
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS:
            return help_text
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{help_text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """An argument parser whose help tells defaults, and whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message} (see `{self.prog} --help`)\n")


def exit_code(study: Callable[[], None]) -> int:
    """Runs the study and returns the exit code of the process."""
    try:
        with remembered_interrupts():
            study()
    except SystemExit as exit_request:  # argparse: bad arguments, or --help
        return exit_request.code if isinstance(exit_request.code, int) else EXIT_FAILURE
    except InputError as error:
        return _reported(str(error), EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        return _reported("interrupted; what was finished is kept", EXIT_INTERRUPTED)
    except (OSError, ValueError, RuntimeError) as error:
        return _reported(f"{type(error).__name__}: {error}", EXIT_FAILURE)
    return EXIT_OK


def existing_folder(text: str) -> Path:
    """Returns the folder of this name; an argparse type."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return Path(text)


def _number(
    kind: type[int] | type[float], accepts: Callable[[float], bool], expected: str
) -> Callable[[str], float]:
    """Returns an argparse type: a number of this kind that `accepts` allows."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return number


positive_int = _number(int, lambda value: value >= 1, "a whole number of at least 1")
seed = _number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")
positive_float = _number(float, lambda value: 0 < value < float("inf"), "a number above 0")
fraction = _number(float, lambda value: 0 <= value <= 1, "a fraction from 0 to 1")


def _reported(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
