"""Folders that are complete or not there, and the error for those that can't be used."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint can't be written where it should be, can't be read, or does not fit."""


@contextlib.contextmanager
def as_checkpoint_error(message: str) -> Iterator[None]:
    """Turns what the file system, JSON or a reader of arrays raises into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{message}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def complete_folder(destination: Path) -> Iterator[Path]:
    """Gives an empty folder to write into, which stands at `destination` when the block is done.

    What was at `destination` stays until then, and for good where the block fails.
    """
    unfinished = _sibling(destination, "unfinished")
    with _removed_on_failure(unfinished), as_checkpoint_error(cannot_write(destination)):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        _put_in_place(unfinished, destination)


def cannot_write(destination: Path) -> str:
    """Returns the beginning of the error for a folder that can't be written."""
    return f"`path` {destination} can't be written"


def is_free(destination: Path) -> bool:
    """Says whether nothing is at `destination`, or an empty folder."""
    is_empty_folder = destination.is_dir() and not any(destination.iterdir())
    return is_empty_folder or not destination.exists()


def interruption_hint(source: Path) -> str:
    """Returns what to do about a folder that is missing since its replacement was interrupted."""
    previous = _sibling(source, "previous")
    if not previous.exists():
        return ""
    return f" An interrupted save left the one before at {previous}: rename it to {source.name}."


def _sibling(destination: Path, state: str) -> Path:
    return destination.with_name(f".{destination.name}.{state}")


def _put_in_place(unfinished: Path, destination: Path) -> None:
    previous = _sibling(destination, "previous")
    if destination.exists():
        shutil.rmtree(previous, ignore_errors=True)
        destination.rename(previous)
    try:
        unfinished.rename(destination)
    except OSError:
        if previous.exists():
            previous.rename(destination)
        raise
    shutil.rmtree(previous, ignore_errors=True)


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
