"""Files that are whole or absent, and the folders that they are in."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.common.errors import InputError


def writable_folder(path: Path, option: str) -> Path:
    """Returns the folder, created if need be.

    Raises:
      InputError: it can't be written; the option that names it is in the message.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{option} {path} can't be written ({reason}); pass a folder that you may write to"
        ) from error
    return path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path, and moves what is there to `path` if the block succeeds."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def bytes_in(folder: Path) -> int:
    """Returns the size of all the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
