"""Packages that only some studies need."""

import importlib
import importlib.util
from types import ModuleType

from experiments.errors import InputError


def needed_module(name: str, extra: str) -> ModuleType:
    """Returns the module; raises, naming the extra that installs it, where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _missing(error.name, extra) from error


def check_installed(name: str, extra: str) -> None:
    """Raises as `needed_module` does, and imports nothing."""
    if importlib.util.find_spec(name) is None:
        raise _missing(name, extra)


def _missing(name: str | None, extra: str) -> InputError:
    return InputError(
        f"{name} is not installed, and this study needs it: pip install 'lora-jax[{extra}]'"
    )
