"""What a process of the command runs.

A new process finds its work by the name of a module, and `__main__` is none that it could import.
"""

from collections.abc import Sequence

import jax

from tests.battery.rows import Row
from tests.battery.running import reason_against
from tests.conftest import free_programs  # which also sets JAX as the tests have it


def reasons_against(names: Sequence[str]) -> list[str]:
    """Returns what is wrong with each row, or empty texts; rows cross between processes by name."""
    with jax.numpy_rank_promotion("allow"):
        reasons = [reason_against(Row.named(name)) for name in names]
    free_programs()
    return reasons
