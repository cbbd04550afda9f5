"""Trees, files and what the tests of checkpoints do to them."""

import contextlib
import json
import threading

import jax.numpy as jnp

from lora_jax.checkpoint._files import signed_text


def a_dict(dtype=jnp.float32):
    return {
        "encoder": [
            {"kernel": jnp.ones((6, 4), dtype), "bias": jnp.zeros(4, dtype)},
            {"kernel": jnp.full((4, 5), 2, dtype), "bias": jnp.ones(5, dtype)},
        ],
        "head": (jnp.ones((5, 3), dtype), {"steps": jnp.arange(3)}),
    }


def edit_json(file, change):
    """Rewrites a file as a program might that also writes the right checksum of it."""
    content = json.loads(file.read_text())
    change(content)
    del content["own_crc32"]
    file.write_text(signed_text(content.pop("format"), content.pop("version"), content))


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
