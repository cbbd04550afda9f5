"""Files that are whole or absent, and the folders that they are in."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.common.errors import InputError

if sys.platform != "win32":
    import fcntl


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
def used_alone(path: Path, option: str) -> Iterator[None]:
    """Keeps other runs out of a folder within the block.

    Raises:
      InputError: another run uses it; the option that names it is in the message.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise InputError(
            f"{option} {path} is used by another run; wait for its end, or pass another folder"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


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
