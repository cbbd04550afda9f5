"""Comparing objects as keys: by content, or by identity."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """Holds an object and compares and hashes by its identity.

    Attributes:
      value: the object, which need not be hashable.
    """

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def is_hashable(value: Any) -> bool:
    """Says whether a value, with everything in it, can be hashed."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
