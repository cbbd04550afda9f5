"""Kinds of bases: arrays, and what they are quantised to."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Base:
    """What stands under the adapters of a model.

    Attributes:
      name: its name.
      format: None, or the format that weights are quantised to.
      alone: the weights that have no adapter.
    """

    name: str
    format: str | None = None
    alone: tuple[str, ...] = ()


BASES = [
    Base("array"),
    Base("nf4", format="nf4"),
    Base("int8", format="int8"),
    Base("int4", format="int4"),
    Base("fp8", format="fp8_e4m3"),
    Base("nf4, one alone", format="nf4", alone=("v",)),
]
