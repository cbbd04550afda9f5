"""How much memory a process has used."""

import resource
import sys

import jax

# The operating system counts in kilobytes, but for macOS.
_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_bytes() -> int:
    """Returns the most in use at once: of the accelerator's memory, or else of the host's."""
    statistics = jax.devices()[0].memory_stats() or {}
    of_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    return int(statistics.get("peak_bytes_in_use", of_host))
