"""Trees, files and what the tests of checkpoints do to them."""

import contextlib
import threading

import jax
import numpy as np


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()


def contents(folder):
    """Returns every file below `folder` with its bytes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def damage_file(file, original, damage):
    middle = len(original) // 2
    if damage == "deleted":
        file.unlink()
    elif damage == "emptied":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(original[:middle])
    else:
        flipped = bytes([original[middle] ^ 0x55])
        file.write_bytes(original[:middle] + flipped + original[middle + 1 :])


@contextlib.contextmanager
def no_new_threads():
    """Asserts that what runs within leaves no thread; one that is about to end may take a while."""
    before = set(threading.enumerate())
    yield
    new = set(threading.enumerate()) - before
    for thread in new:
        thread.join(timeout=20)
    assert not [thread.name for thread in new if thread.is_alive()]
