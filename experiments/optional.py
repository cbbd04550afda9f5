"""Packages that only some studies need."""

import importlib
from types import ModuleType

from experiments.errors import InputError


def needed_module(name: str, extra: str) -> ModuleType:
    """Returns the module; raises, naming the extra that installs it, where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed, and this study needs it: "
            f"pip install 'lora-jax[{extra}]'"
        ) from error
