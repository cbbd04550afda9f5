"""Every order of roles that the axes of a two- or three-axis weight can have."""

import dataclasses
import itertools

# All sizes differ, so that a wrong axis shows, and are even, so that two devices can share them.
_SIZES = (4, 6, 8)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The role and the size of each axis of a weight."""

    axes: tuple[str, ...]
    sizes: tuple[int, ...] = _SIZES

    @property
    def name(self) -> str:
        return ",".join(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes[: len(self.axes)]

    def held(self, *roles: str) -> list[int]:
        """Returns the axes that have one of these roles, in the order of the roles."""
        return [axis for role in roles for axis, found in enumerate(self.axes) if found == role]


LAYOUTS = [
    Layout(axes)
    for roles in (("in", "out"), ("batch", "in", "out"), ("in", "in", "out"), ("in", "out", "out"))
    for axes in sorted(set(itertools.permutations(roles)))
]
