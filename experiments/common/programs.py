"""Compiled programs on disk, so that a second run of a study starts at once."""

import contextlib
import os
from pathlib import Path

import jax


def keep_programs() -> None:
    """Lets JAX keep compiled programs between runs, unless a folder for them is chosen already.

    JAX finds them by the program, the device and its own version. `JAX_COMPILATION_CACHE_DIR`
    chooses another folder, and `JAX_ENABLE_COMPILATION_CACHE=false` keeps none.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = kept_files() / "programs"
    with contextlib.suppress(OSError):  # without a place to write to, each run compiles
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def kept_files() -> Path:
    """Returns the folder in the user's cache for what is kept between runs."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    return (Path(chosen) if chosen else Path.home() / ".cache") / "lora_jax"
