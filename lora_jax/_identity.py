"""What tells an object from others where it is a key: its content, or which object it is."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """Equals what holds the same object, and hashes by it.

    Attributes:
      value: the object, which need not be hashable.
    """

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def is_hashable(value: Any) -> bool:
    """Says whether a value, with all that it holds, can be hashed."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
