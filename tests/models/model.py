"""What the battery knows of each model: how to build it, and what is expected of its weights."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

_ROLES = {"i": "in", "o": "out", "b": "batch"}


class Call(NamedTuple):
    """A call of a model, `fn(params, *args)`, with numbers."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model of a third party, and what is expected of its weights.

    Axes are written with a letter each: `"ioo"` for in, out, out. `linear` is all that
    `"all-linear"` means, nothing less and nothing more: no bias, norm scale, position table or
    head. `also` are other weights that an adapter fits, the head and embeddings, which the battery
    adapts too. `dense` are weights so small that building W + AB is the cheaper way. `by_hand` are
    axes that a model's use of a weight does not show. `materialized` gives, for each weight that is
    not factored, the reason. `float32_because` is why the reference cannot be computed in float64.
    `promotion` is the dtype promotion that the model itself needs.
    """

    name: str
    call: Callable[[], Call]
    linear: Mapping[str, str]
    also: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dense: frozenset[str] = frozenset()
    by_hand: Mapping[str, str] = dataclasses.field(default_factory=dict)
    materialized: Mapping[str, str] = dataclasses.field(default_factory=dict)
    float32_because: str = ""
    promotion: str = "strict"


MODELS: list[Model] = []


def model(
    linear: Mapping[str, str], also: Mapping[str, str] | None = None, **options: Any
) -> Callable[[Callable[[], Call]], Callable[[], Call]]:
    """Returns a decorator that adds a row for the model that a function builds."""

    def added(call: Callable[[], Call]) -> Callable[[], Call]:
        MODELS.append(Model(call.__name__, call, linear, also or {}, **options))
        return call

    return added


def drawn(initialise: Callable[..., Any], *args: Any, seed: int = 3) -> Any:
    """Returns parameters of the shapes that a module's own initialisation gives, drawn by NumPy.

    To compile each initialisation would take as long as the tests.
    """
    random = np.random.default_rng(seed)

    def of(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "scale":
            numbers = random.uniform(0.5, 1.5, leaf.shape)
        else:
            inputs = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 100
            numbers = random.standard_normal(leaf.shape) / np.sqrt(inputs)
        return jax.device_put(numbers.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(of, jax.eval_shape(initialise, *args))


def fresh(initialise: Callable[..., Any], *args: Any) -> Any:
    """Returns a state as it is at the start: variances are one, all else is zero."""

    def of(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = 1 if path[-1].key == "var" else 0
        return jax.device_put(np.full(leaf.shape, value, leaf.dtype))

    return jax.tree_util.tree_map_with_path(of, jax.eval_shape(initialise, *args))


def prefixed(prefix: str, axes: Mapping[str, str]) -> dict[str, str]:
    """Returns the same axes for weights that lie below `prefix`."""
    return {f"{prefix}/{path}": letters for path, letters in axes.items()}


def roles(letters: str) -> tuple[str, ...]:
    """Returns the axes that the letters stand for."""
    return tuple(_ROLES[letter] for letter in letters)
