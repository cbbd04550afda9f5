"""The ops, by family."""

from tests.battery.ops import (
    arithmetic,
    calls,
    collectives,
    contractions,
    lookups,
    loops,
    structure,
)
from tests.battery.registry import OPS

__all__ = [
    "OPS",
    "arithmetic",
    "calls",
    "collectives",
    "contractions",
    "lookups",
    "loops",
    "structure",
]
