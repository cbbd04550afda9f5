"""Commands that measure: their options, and the file of all numbers that `--json` asks for."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stored import made_by
from experiments.common.errors import InputError
from experiments.common.files import writable_folder, write_json
from experiments.common.options import Parser


class MeasuringParser(Parser):
    """A parser with `--json FILE`. What it returns has the whole command, as `command`.

    Args:
      name: that of the module in `benchmarks`.
      description: what the command does.
    """

    def __init__(self, name: str, description: str | None, **options: Any) -> None:
        super().__init__(prog=f"python -m benchmarks.{name}", description=description, **options)
        self.add_argument("--json", type=_file, metavar="FILE", help="write all numbers to a file")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Returns the options and the command."""
        options = super().parse_args(args, namespace)
        given = sys.argv[1:] if args is None else args
        options.command = f"{self.prog} {shlex.join(given)}".strip()
        return options


def _file(text: str) -> Path:
    """Returns the file of this name, which can be written; a type of options."""
    try:
        writable_folder(Path(text).parent, "its folder")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def write_found(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Writes what a command has found, if `--json` names a file.

    Args:
      options: what `MeasuringParser` returned.
      found: all numbers, fit for JSON.
    """
    if options.json:
        write_json(options.json, {**made_by(options.command), **found})
