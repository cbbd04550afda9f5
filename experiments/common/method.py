"""A way to fine-tune, by its name and the rank of its adapters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

_NAMES = {
    "lora": "LoRA",
    "dora": "DoRA",
    "full": "full fine-tuning",
    "head": "head alone",
    "none": "no adapters",
}


@dataclass(frozen=True)
class Method:
    """A way to fine-tune; the rank is that of the adapters, or None if there are none.

    Attributes:
      learning_rates: the greatest learning rate of each method, unless the caller chooses one.
    """

    name: str
    rank: int | None
    learning_rates: ClassVar[Mapping[str, float]]

    def __str__(self) -> str:
        name = _NAMES[self.name]
        return name if self.rank is None else f"{name}, rank {self.rank}"

    @property
    def learning_rate(self) -> float:
        return self.learning_rates[self.name]

    @property
    def has_adapters(self) -> bool:
        return self.rank is not None

    @classmethod
    def described_rates(cls) -> str:
        """Returns the learning rates in words, for help."""
        return ", ".join(f"{rate:g} for {name}" for name, rate in cls.learning_rates.items())
