"""Folders and files that are either complete or absent, and the error for unusable ones.

A folder is written under a name of its own beside its destination, and takes its place when it is
complete: by one rename where nothing is there, and otherwise by an exchange of the two, after which
what was there is removed under a name that only this process knows. So no process ever removes
what another one writes or has put in place, the last of several to finish stays, and a process that
dies leaves the previous folder. Linux has this exchange; elsewhere there are two renames, between
which nothing is at the destination.

A folder is locked while it is written, which distinguishes the remains of a dead process from a
folder that another process is about to complete. Readers share a lock of what they read, and
whoever replaces it waits for them, though not for ever. A single file is written into such a folder
and moved out of it, for which every system has one step.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

if sys.platform != "win32":
    import fcntl

Read = TypeVar("Read")

_UNFINISHED, _PREVIOUS = ".unfinished", ".previous"

# Of Linux's fcntl.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)

# A process that hangs while it reads must not stop one that saves: after so many seconds it is
# treated as it is where there are no locks.
_PATIENCE = 10.0
_PAUSE = 0.002


class CheckpointError(ValueError):
    """A checkpoint can't be written where it should be, can't be read, or does not fit."""


@contextlib.contextmanager
def as_checkpoint_error(message: str) -> Iterator[None]:
    """Turns errors of the file system, JSON or a reader of arrays into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{message}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def complete_folder(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives an empty folder to write into, which stands at `destination` when the block is done.

    What was at `destination` stays until then, and for good where the block fails. What another
    process has put there in the meantime is replaced only if `overwrite` says so.
    """
    with as_checkpoint_error(cannot_write(destination)):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked_folder(destination) as unfinished, _removed_on_failure(unfinished):
            yield unfinished
            _put_in_place(unfinished, destination, overwrite)
        _remove_abandoned(destination)


@contextlib.contextmanager
def complete_file(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives the name of a file to write, which stands at `destination` when the block is done.

    For what was there, and for other processes, it is as with `complete_folder`.
    """
    with as_checkpoint_error(cannot_write(destination)):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked_folder(destination) as unfinished:
            try:
                file = unfinished / destination.name
                yield file
                _put_file_in_place(file, destination, overwrite)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        _remove_abandoned(destination)


def undisturbed(folder: Path, read: Callable[[], Read]) -> Read:
    """Returns what `read` reads of one version of a folder, which another process may replace.

    Where there are locks, it is not replaced meanwhile. Elsewhere `read` may fail half-way or mix
    two versions, and is called again.
    """
    while True:
        with _kept_in_place(folder, shared=True):
            before = _identity(folder)
            try:
                result = read()
            except CheckpointError:
                if _identity(folder) == before:
                    raise
                continue
            if _identity(folder) == before:
                return result


def cannot_write(destination: Path) -> str:
    """Returns the beginning of the error for a folder that can't be written."""
    return f"`path` {destination} can't be written"


def check_destination(
    destination: Path, *, obstacle: Callable[[Path], str | None], content: str, overwrite: bool
) -> None:
    """Raises a `CheckpointError` unless a folder or a file may be written at `destination`.

    Args:
      destination: what to write.
      obstacle: returns, of what is there, why it must not be deleted, or None.
      content: what is there if nothing prevents replacing it.
      overwrite: whether that may be replaced.
    """
    with as_checkpoint_error(cannot_write(destination)):
        if _is_free(destination):
            return
        # Replacing deletes, so it must not reach a folder that holds anything else.
        found = obstacle(destination)
    if found is not None:
        raise CheckpointError(f"`path` {destination} {found}; choose another one.")
    if not overwrite:
        raise CheckpointError(
            f"`path` {destination} holds {content}; save(path, ..., overwrite=True) replaces it."
        )


def interruption_hint(source: Path) -> str:
    """Returns what to do about a folder that is missing since its replacement was interrupted."""
    previous = _siblings(source, _PREVIOUS)
    if not previous:
        return ""
    return (
        f" An interrupted save left the previous one at {previous[-1]}: rename it to {source.name}."
    )


def _is_free(destination: Path) -> bool:
    """Says whether nothing is at `destination`, or an empty folder."""
    is_empty_folder = destination.is_dir() and not any(destination.iterdir())
    return is_empty_folder or not destination.exists()


def _siblings(destination: Path, *states: str) -> list[Path]:
    """Returns the folders that saves to `destination` made beside it, of those states."""
    if not destination.parent.is_dir():
        return []
    name = re.compile(rf"\.{re.escape(destination.name)}(\.[0-9a-f]{{8}})?({'|'.join(states)})")
    return sorted(path for path in destination.parent.iterdir() if name.fullmatch(path.name))


@contextlib.contextmanager
def _locked_folder(destination: Path) -> Iterator[Path]:
    """Gives a new folder beside `destination`, which is locked until the block ends."""
    while True:
        name = f".{destination.name}.{secrets.token_hex(4)}{_UNFINISHED}"
        folder = destination.with_name(name)
        folder.mkdir()
        lock = _lock(folder)
        if folder.is_dir():
            break
        _unlock(lock)  # it was taken for abandoned before it was locked
    try:
        yield folder
    finally:
        _unlock(lock)


@contextlib.contextmanager
def _kept_in_place(folder: Path, *, shared: bool) -> Iterator[None]:
    """Locks what is at a path: shared, nobody replaces it; otherwise, nobody reads it either."""
    lock = _lock(folder, shared=shared)
    while lock is not None and not _is_at(folder, lock):
        _unlock(lock)  # it was replaced before it was locked
        lock = _lock(folder, shared=shared)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(folder: Path, *, shared: bool = False, patience: float | None = None) -> int | None:
    """Returns a lock of a folder; None where there are none, or where it stays another's."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + (_PATIENCE if patience is None else patience)
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            if not isinstance(error, BlockingIOError) or time.monotonic() > deadline:
                os.close(descriptor)
                return None
        time.sleep(_PAUSE)


def _is_at(folder: Path, descriptor: int) -> bool:
    """Says whether an open folder is the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except OSError:
        return False


def _unlock(lock: int | None) -> None:
    if lock is not None:
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing leaves it to a process forked meanwhile
        os.close(lock)


def _put_in_place(unfinished: Path, destination: Path, overwrite: bool) -> None:
    while not _is_renamed(unfinished, destination):
        if not overwrite:
            raise _taken_meanwhile(destination)
        with _kept_in_place(destination, shared=False):
            if _is_exchanged(unfinished, destination):
                shutil.rmtree(unfinished, ignore_errors=True)
                return
            if _is_put_in_two_steps(unfinished, destination):
                return


def _put_file_in_place(file: Path, destination: Path, overwrite: bool) -> None:
    if overwrite:
        file.replace(destination)
        return
    try:
        # Unlike a rename, a link never replaces what is there.
        destination.hardlink_to(file)
    except OSError as error:
        if destination.exists():
            raise _taken_meanwhile(destination) from error
        file.replace(destination)  # a file system without links


def _taken_meanwhile(destination: Path) -> CheckpointError:
    return CheckpointError(
        f"`path` {destination} was taken by another process in the meantime; "
        "save(path, ..., overwrite=True) replaces what is there."
    )


def _is_renamed(folder: Path, destination: Path) -> bool:
    """Renames a folder unless something is at the destination, and says whether it did."""
    try:
        folder.rename(destination)
    except OSError as error:
        if error.errno in _NOT_EMPTY:
            return False
        raise
    return True


def _is_exchanged(folder: Path, other: Path) -> bool:
    """Exchanges two folders in one step, and says whether it did: not every system can."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform != "win32" else None
    if renameat2 is None:
        return False
    names = os.fsencode(folder), os.fsencode(other)
    failed: int = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return failed == 0


def _is_put_in_two_steps(unfinished: Path, destination: Path) -> bool:
    """Puts a folder in place of another, and says whether it did: another process may be faster."""
    previous = unfinished.with_suffix(_PREVIOUS)
    try:
        destination.rename(previous)
    except FileNotFoundError:
        return False
    try:
        is_renamed = _is_renamed(unfinished, destination)
    except OSError:
        previous.rename(destination)
        raise
    shutil.rmtree(previous, ignore_errors=True)
    return is_renamed


def _remove_abandoned(destination: Path) -> None:
    """Removes the remains of processes that died while they saved to `destination`."""
    for folder in _siblings(destination, _UNFINISHED, _PREVIOUS):
        lock = _lock(folder, patience=0)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Returns an identifier that changes when another folder takes its place."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
