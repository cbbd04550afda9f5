"""Commands of the project in processes of their own, for what is stored of them."""

import shlex
import subprocess
import sys
from collections.abc import Sequence

from experiments.common.errors import EXIT_INTERRUPTED, EXIT_OK


def run_module(command: Sequence[str]) -> None:
    """Runs a module with its options, as `python -m` does.

    Args:
      command: the name of the module, and the options.

    Raises:
      KeyboardInterrupt: it was interrupted.
      RuntimeError: it failed.
    """
    code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code != EXIT_OK:
        raise RuntimeError(f"{as_typed(command)} ended with {code}")


def as_typed(command: Sequence[str]) -> str:
    """Returns a module with its options as a reader types it."""
    return shlex.join(["python", "-m", *command])
