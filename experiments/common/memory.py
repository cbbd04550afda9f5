"""How much memory a process uses, and whether it keeps what it frees."""

import ctypes
import re
import resource
import sys
from pathlib import Path

# getrusage counts in kilobytes, except on macOS.
_UNIT = 1 if sys.platform == "darwin" else 1024

MEGABYTE = 1e6

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
# Any number of its type, an int, is less than what some programs free.
_NEVER = -1


def keep_freed_memory() -> None:
    """Makes the process keep freed memory for what it allocates next.

    On a CPU, XLA allocates the temporary memory of a program at each call. glibc returns blocks of
    that size to the system at once, which hands them out again page by page, zeroed: on a virtual
    machine that can take a tenth of a training step. Call it before other threads start: what a
    thread frees into its own arena is of no use to the others. Without glibc nothing happens.
    """
    _call_glibc("mallopt", _M_ARENA_MAX, 1)
    _call_glibc("mallopt", _M_MMAP_MAX, 0)
    _call_glibc("mallopt", _M_TRIM_THRESHOLD, _NEVER)


def return_freed_memory() -> None:
    """Returns freed memory to the system: a compiler leaves some hundred megabytes."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


def peak_bytes() -> int:
    """Returns the peak memory in use: the accelerator's if it is known, otherwise the host's."""
    found = accelerator_peak_bytes()
    return host_peak_bytes() if found is None else found


def accelerator_peak_bytes() -> int | None:
    """Returns the peak of the accelerator's memory that JAX has used; None if it is not known."""
    # Imported late: a process that measures PyTorch alone should not hold JAX in memory.
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    found = statistics.get("peak_bytes_in_use")
    return None if found is None else int(found)


def host_peak_bytes() -> int:
    """Returns the peak of the host's memory that the process has used."""
    # Not getrusage, which on Linux includes the process that started this one.
    return _of_status("VmHWM")


def forget_host_peak() -> None:
    """Makes `host_peak_bytes` count from now on; without Linux nothing happens."""
    if sys.platform == "linux":
        # proc(5): 5 resets the peak to what is in use.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def host_bytes() -> int:
    """Returns the host's memory that the process uses; its peak where that alone is known."""
    return _of_status("VmRSS")


def _of_status(name: str) -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    (kilobytes,) = re.findall(rf"^{name}:\s*(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024
