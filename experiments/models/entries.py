"""The entries of a `config.json`: what a file holds, and entries of the type that is expected."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from experiments.common.errors import InputError

CONFIG = "config.json"
Entries = Mapping[str, Any]

_TYPE_NAMES = {
    int: "a whole number",
    int | None: "a whole number",
    float: "a number",
    str: "a name",
    bool: "true or false",
}


def read_entries(path: Path) -> dict[str, Any]:
    """Returns the entries in a `config.json`.

    Raises:
      InputError: the file can't be read, or holds something else.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise InputError(f"{path} is not a model's config.json: expected a JSON object")
    return entries


def entry(entries: Entries, name: str, expected: Any, source: str) -> Any:
    """Returns an entry.

    Args:
      entries: all of them.
      name: its name.
      expected: the type of the field that it becomes.
      source: where the entries are from, for errors.

    Raises:
      InputError: it is missing, or of another type.
    """
    if name not in entries:
        raise InputError(f"{source}: {name} is missing; expected the settings of a language model")
    value = entries[name]
    # JSON has one type of number, so 1 may stand for 1.0; but true is not 1.
    allowed = expected | int if expected is float else expected
    if not isinstance(value, allowed) or (isinstance(value, bool) and expected is not bool):
        raise InputError(f"{source}: {name} is {value!r}, expected {_TYPE_NAMES[expected]}")
    return value


def without_none(entries: Entries) -> dict[str, Any]:
    """Returns the entries that are set."""
    return {name: value for name, value in entries.items() if value is not None}


def check_supported(entries: Entries, supported: Entries, source: str) -> None:
    """Raises if an entry asks for what a model does not compute.

    Args:
      entries: all of them.
      supported: the only value that the model computes with, by the entry's name.
      source: where the entries are from, for errors.
    """
    for name, value in supported.items():
        if entries.get(name, value) != value:
            raise InputError(
                f"{source}: {name} is {entries[name]!r}; this model computes with {value!r} alone"
            )


def check_unquantized(entries: Entries, source: str) -> None:
    """Raises if the weights beside the entries are quantised."""
    quantized = entries.get("quantization_config")
    if quantized:
        raise InputError(
            f"{source}: the weights are quantised by {quantized.get('quant_method')!r}; expected "
            "the folder of the model in 16 or 32 bits, which can be quantised while it is read"
        )


def check_positive(config: Any, source: str, *, zero_allowed: Iterable[str] = ()) -> None:
    """Raises if a number of the settings is not more than zero, where zero has no meaning."""
    for field in fields(config):
        value = getattr(config, field.name)
        is_number = field.type in (int, int | None, float) and value is not None
        if is_number and value <= 0 and not (value == 0 and field.name in zero_allowed):
            raise InputError(f"{source}: {field.name} is {value}, expected more than 0")
