"""Checksums of files: whether they are as they were written."""

import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from lora_jax._folders import CheckpointError, as_checkpoint_error

_CHUNK = 1 << 20


def file_checksums(folder: Path, below: str) -> dict[str, int]:
    """Returns the checksum of every file below a part of `folder`, by its name in `folder`."""
    files = sorted(file for file in (folder / below).rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): _checksum(file) for file in files}


def check_files(folder: Path, checksums: Mapping[str, int], *, damaged: str) -> None:
    """Raises a `CheckpointError`, which starts with `damaged`, unless all files are as they were.

    This comes before Orbax reads: it would leave threads and event loops behind on the way out.
    """
    escaping = [name for name in checksums if not _is_below(name)]
    if escaping:
        raise CheckpointError(
            f"the checkpoint {folder} names the file {escaping[0]!r}, which is not below that "
            "folder, and nothing was read; expected a checkpoint that lora_jax wrote."
        )
    with as_checkpoint_error(damaged):
        for name, checksum in checksums.items():
            if _checksum(folder / name) != checksum:
                raise CheckpointError(f"{damaged}: {name} is not as it was saved.")


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _is_below(name: str) -> bool:
    """Says whether `name` stays below the folder that it is joined to, on any system."""
    return not any(
        path.drive or path.root or ".." in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )
