"""Memory of a process: what is counted, and that glibc is told nothing wrong."""

import subprocess
import sys

import numpy as np

from experiments.common.memory import host_peak_bytes, peak_bytes

HELD = 100_000_000

PROGRAM = """
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


def test_the_peak_grows_with_what_is_held():
    before = host_peak_bytes()
    held = np.ones(before // 8 + HELD // 8)
    assert host_peak_bytes() >= held.nbytes
    assert peak_bytes() >= held.nbytes


def test_kept_memory_is_used_again_and_needs_no_jax():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]
