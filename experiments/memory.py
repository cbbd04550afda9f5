"""How much memory a process has used."""

import ctypes
import re
import resource
import sys
from pathlib import Path

# getrusage counts in kilobytes, but on macOS.
_UNIT = 1 if sys.platform == "darwin" else 1024

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Has the process keep memory that is freed, for what is allocated next.

    XLA on a CPU allocates what a program has in between at each call. glibc gives blocks of that
    size back to the system at once, which then hands them out again page by page, zeroed: on a
    virtual machine that can take a tenth of a training step. Call it before there are other
    threads: what one frees into an arena of its own is of no use to the others. Nothing happens
    without glibc.
    """
    _call_glibc("mallopt", _M_ARENA_MAX, 1)
    _call_glibc("mallopt", _M_MMAP_MAX, 0)
    _call_glibc("mallopt", _M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Gives what is freed by now back to the system: a compiler leaves some hundred megabytes."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


def peak_bytes() -> int:
    """Returns the most in use at once: of the accelerator's memory, or else of the host's."""
    # Imported late: a process that only PyTorch is measured in has no JAX in its memory.
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    return int(statistics.get("peak_bytes_in_use", host_peak_bytes()))


def host_peak_bytes() -> int:
    """Returns the most of the host's memory that the process had at once."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    # Not what getrusage says: on Linux that counts the process from which this one was started.
    (kilobytes,) = re.findall(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024
