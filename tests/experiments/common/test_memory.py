"""Memory of a process: what is counted, and that glibc is told nothing wrong."""

import subprocess
import sys

import pytest

# In a process of its own: the peak of the one that runs tests may be gigabytes, and never falls.
GROWING = """
import numpy as np
from experiments.common.memory import host_peak_bytes, peak_bytes
held = np.ones((host_peak_bytes() + 100_000_000) // 8)
print(host_peak_bytes() >= held.nbytes, peak_bytes() >= held.nbytes)
"""

KEEPING = """
import numpy as np
from experiments.common.memory import host_peak_bytes, keep_freed_memory, return_freed_memory
keep_freed_memory()
before = host_peak_bytes()
np.ones(50_000_000)
assert host_peak_bytes() - before > 390_000_000
return_freed_memory()
np.ones(40_000_000)
import sys
print(host_peak_bytes() - before < 450_000_000, "jax" in sys.modules)
"""

# Blocks beyond what any trim threshold but that of `keep_freed_memory` would keep; pages that have
# been touched once cost no fault again.
BEYOND_TWO_GIGABYTES = """
import ctypes, resource
from experiments.common.memory import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def touch_pages():
    block = libc.malloc(9 << 28)
    for page in range(0, 9 << 28, 1 << 24):
        ctypes.memset(block + page, 1, 1)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch_pages()
before = touch_pages()
print(touch_pages() - before)
"""


def printed(program):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_the_peak_grows_with_what_is_held():
    assert printed(GROWING) == ["True", "True"]


def test_kept_memory_is_used_again_and_needs_no_jax():
    assert printed(KEEPING) == ["True", "False"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone keeps what is freed")
def test_more_than_two_gigabytes_are_kept_too():
    (faults,) = printed(BEYOND_TWO_GIGABYTES)
    # A step of the block touches 144 pages.
    assert int(faults) < 50
