"""The settings that `wrap` takes for each target, with their defaults and checks."""

import collections
import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._dtypes import is_narrow_float
from lora_jax._paths import listed
from lora_jax._shapes import Axes, largest_rank
from lora_jax._weight import FACTORS
from lora_jax.init import initializer
from lora_jax.init._registry import AnyInitializer

# What a low-rank adapter alone is made by.
_OF_LOW_RANK = ("rank", "alpha", "rslora", "init")

# A check of a setting: takes its name in errors and the given value, returns the value to use.
Checked = Callable[[str, Any], Any]


def checked_rank(subject: str, rank: Any) -> int:
    """Returns a rank as an int, after checking that it is a whole number of at least 1."""
    if isinstance(rank, bool) or not hasattr(rank, "__index__"):
        raise TypeError(f"{subject} is {rank!r}; expected a whole number of at least 1.")
    if operator.index(rank) < 1:
        raise ValueError(f"{subject} is {rank}; expected a whole number of at least 1.")
    return operator.index(rank)


def check_rank_fits(
    rank: int, path: str, shape: tuple[int, ...], axes: Axes, *, remedy: str = ""
) -> None:
    """Raises if a rank is above a weight's smaller side.

    Args:
      rank: the rank.
      path: the weight's path.
      shape: its shape.
      axes: the role of each of its axes.
      remedy: a sentence with the call that fixes it, with `{largest}` for the largest rank.
    """
    largest = largest_rank(shape, axes)
    if rank > largest:
        raise ValueError(
            f"`rank` is {rank} for '{path}' of shape {shape} with the axes {axes}; expected at "
            f"most {largest}, its smaller side.{remedy.format(largest=largest)}"
        )


def checked_freeze(subject: str, freeze: Any) -> tuple[str, ...]:
    """Returns the checked names of the leaves that do not train."""
    names = (freeze,) if isinstance(freeze, str) else freeze
    if not isinstance(names, tuple | list) or not all(name in FACTORS for name in names):
        raise ValueError(
            f"{subject} is {freeze!r}; expected one of {listed(FACTORS)}, or a list of them."
        )
    return tuple(names)


def _checked_alpha(subject: str, alpha: Any) -> float | None:
    if alpha is None:
        return None
    if isinstance(alpha, bool | str) or not hasattr(alpha, "__float__") or np.ndim(alpha) != 0:
        raise TypeError(f"{subject} is {alpha!r}; expected a number.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{subject} is {alpha}; expected a positive, finite number.")
    return float(alpha)


def _checked_flag(subject: str, flag: Any) -> bool:
    if not isinstance(flag, bool):
        raise TypeError(f"{subject} is {flag!r}; expected True or False.")
    return flag


def _checked_init(subject: str, init: Any) -> AnyInitializer:
    del subject
    return initializer(init)


def _checked_layers(subject: str, layers: Any) -> tuple[int, ...] | None:
    """Returns the indices of layers in order."""
    if layers is None:
        return None
    is_sequence = isinstance(layers, Sequence | np.ndarray) and not isinstance(layers, str)
    if not is_sequence or not all(_is_place(layer) for layer in layers):
        raise TypeError(f"{subject} is {layers!r}; expected whole numbers, such as range(4, 8).")
    places = [operator.index(layer) for layer in layers]
    if not places or min(places) < 0 or len(set(places)) < len(places):
        raise ValueError(
            f"{subject} is {layers!r}; expected at least one index, counted from 0, each once."
        )
    return tuple(sorted(places))


def _checked_rows(subject: str, rows: Any) -> tuple[int, ...] | None:
    """Returns the numbers of rows in the order given."""
    if rows is None:
        return None
    is_sequence = isinstance(rows, Sequence | np.ndarray) and not isinstance(rows, str)
    if not is_sequence or not all(map(_is_place, rows)):
        raise TypeError(f"{subject} is {rows!r}; expected whole numbers, such as [50257, 50258].")
    numbers = tuple(map(operator.index, rows))
    if not numbers or min(numbers) < 0:
        raise ValueError(
            f"{subject} is {rows!r}; expected the number of at least one row, counted from 0."
        )
    repeated = [str(row) for row, count in collections.Counter(numbers).items() if count > 1]
    if repeated:
        raise ValueError(f"{subject} names {listed(repeated)} more than once; expected each once.")
    return numbers


def _is_place(layer: Any) -> bool:
    return hasattr(layer, "__index__") and not isinstance(layer, bool | np.bool_)


def _checked_dtype(subject: str, dtype: Any) -> Any:
    try:
        trains = dtype is None or (
            jnp.issubdtype(jnp.dtype(dtype), jnp.floating) and not is_narrow_float(dtype)
        )
    except TypeError:
        trains = False
    if not trains:
        raise TypeError(
            f"{subject} is {dtype!r}; expected a floating-point dtype of at least 16 bits, or None."
        )
    return dtype


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one weight is adapted: the settings of one target, documented at `wrap`.

    A setting is one field here, with its check, and one argument of `wrap`.
    """

    rank: int = dataclasses.field(metadata={"checked": checked_rank})
    alpha: float | None = dataclasses.field(metadata={"checked": _checked_alpha})
    rslora: bool = dataclasses.field(metadata={"checked": _checked_flag})
    init: AnyInitializer = dataclasses.field(metadata={"checked": _checked_init})
    dora: bool = dataclasses.field(metadata={"checked": _checked_flag})
    layers: tuple[int, ...] | None = dataclasses.field(metadata={"checked": _checked_layers})
    rows: tuple[int, ...] | None = dataclasses.field(metadata={"checked": _checked_rows})
    freeze: tuple[str, ...] = dataclasses.field(metadata={"checked": checked_freeze})
    dtype: Any = dataclasses.field(metadata={"checked": _checked_dtype})

    @classmethod
    def checked(cls, **values: Any) -> "Settings":
        """Returns the settings that hold for every target."""
        checks = cls._checks()
        return cls(**{name: checks[name](f"`{name}`", value) for name, value in values.items()})

    def overridden(self, path: str, overrides: Mapping[str, Any]) -> "Settings":
        """Returns the settings with the overrides of one target applied."""
        checks = self._checks()
        for name in overrides:
            if name not in checks:
                raise ValueError(
                    f"`targets` overrides {name!r} for '{path}'; expected one of "
                    f"{listed(tuple(checks), 20)}."
                )
        meaningless = [name for name in _OF_LOW_RANK if name in overrides]
        if overrides.get("rows") is not None and meaningless:
            raise ValueError(
                f"`targets` overrides {listed(meaningless)} beside 'rows' for '{path}'; rows have "
                "none of these, and a scale of 1. A low-rank adapter of the same weight is a call "
                f"of its own: wrap(wrap(params, ...), {{'{path}': dict(rows=...)}})."
            )
        checked: dict[str, Any] = {
            name: checks[name](f"`{name}` of '{path}'", value) for name, value in overrides.items()
        }
        return dataclasses.replace(self, **checked)

    def scale(self, rank: int) -> float:
        r"""Returns $\alpha / r$, or $\alpha / \sqrt r$ for rsLoRA."""
        alpha = float(rank if self.alpha is None else self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @classmethod
    def _checks(cls) -> dict[str, Checked]:
        return {field.name: field.metadata["checked"] for field in dataclasses.fields(cls)}
