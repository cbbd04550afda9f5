"""What `wrap` can be told of each target: the settings, their defaults and their checks."""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import jax.numpy as jnp
import numpy as np

from lora_jax._dtypes import is_narrow_float
from lora_jax._paths import listed
from lora_jax.init import DataInitializer, Initializer, initializer

FREEZABLE = ("lora_A", "lora_B", "magnitude")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one weight is adapted; `wrap` says what each means."""

    rank: int
    alpha: SupportsFloat | None
    rslora: bool
    init: str | Initializer | DataInitializer
    dora: bool
    layers: Sequence[SupportsIndex] | np.ndarray | None
    freeze: str | Sequence[str]
    dtype: Any

    @classmethod
    def checked(cls, **values: Any) -> "Settings":
        """Returns the settings that hold for every target."""
        for name, value in values.items():
            _CHECKS[name](f"`{name}`", value)
        return cls(**{**values, "rank": operator.index(values["rank"])})

    def overridden(self, path: str, overrides: Mapping[str, Any]) -> "Settings":
        """Returns the settings with those of one target in place of the common ones."""
        for name, value in overrides.items():
            if name not in _CHECKS:
                raise ValueError(
                    f"`targets` overrides {name!r} for '{path}'; expected one of "
                    f"{listed(tuple(_CHECKS), 20)}."
                )
            _CHECKS[name](f"`{name}` of '{path}'", value)
        rank = operator.index(overrides.get("rank", self.rank))
        return dataclasses.replace(self, **{**overrides, "rank": rank})

    def scale(self, rank: int) -> float:
        r"""Returns $\alpha / r$, or $\alpha / \sqrt r$ for rsLoRA."""
        alpha = float(rank if self.alpha is None else self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of leaves that are not to train."""
        return checked_freeze("`freeze`", self.freeze)


def check_rank(subject: str, rank: Any) -> None:
    """Raises unless `rank` is a whole number of at least 1."""
    if isinstance(rank, bool) or not hasattr(rank, "__index__"):
        raise TypeError(f"{subject} is {rank!r}; expected a whole number of at least 1.")
    if operator.index(rank) < 1:
        raise ValueError(f"{subject} is {rank}; expected a whole number of at least 1.")


def checked_freeze(subject: str, freeze: Any) -> tuple[str, ...]:
    """Returns the names of leaves that are not to train, having checked them."""
    names = (freeze,) if isinstance(freeze, str) else freeze
    if not isinstance(names, tuple | list) or not all(name in FREEZABLE for name in names):
        raise ValueError(
            f"{subject} is {freeze!r}; expected one of {listed(FREEZABLE)}, or a list of them."
        )
    return tuple(names)


def _check_alpha(subject: str, alpha: Any) -> None:
    if alpha is None:
        return
    if isinstance(alpha, bool | str) or not hasattr(alpha, "__float__") or np.ndim(alpha) != 0:
        raise TypeError(f"{subject} is {alpha!r}; expected a number.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{subject} is {alpha}; expected a positive, finite number.")


def _check_flag(subject: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{subject} is {flag!r}; expected True or False.")


def _check_init(subject: str, init: Any) -> None:
    del subject
    initializer(init)


def _check_layers(subject: str, layers: Any) -> None:
    if layers is None:
        return
    is_sequence = isinstance(layers, Sequence | np.ndarray) and not isinstance(layers, str)
    if not is_sequence or not all(_is_place(layer) for layer in layers):
        raise TypeError(f"{subject} is {layers!r}; expected whole numbers, such as range(4, 8).")
    places = [operator.index(layer) for layer in layers]
    if not places or min(places) < 0 or len(set(places)) < len(places):
        raise ValueError(
            f"{subject} is {layers!r}; expected at least one place, counted from 0, each once."
        )


def _is_place(layer: Any) -> bool:
    return hasattr(layer, "__index__") and not isinstance(layer, bool | np.bool_)


def _check_dtype(subject: str, dtype: Any) -> None:
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


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "rank": check_rank,
    "alpha": _check_alpha,
    "rslora": _check_flag,
    "init": _check_init,
    "dora": _check_flag,
    "layers": _check_layers,
    "freeze": checked_freeze,
    "dtype": _check_dtype,
}
