"""A row of the law battery: a function of parameters, and what is expected of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A function `(params, x) -> y`, the shapes of its parameters, and what is expected of it.

    `x` is one example: the battery vmaps and scans over several. `how` says how each adapted use
    must be computed. `reverse` says whether JAX can differentiate the function in reverse mode,
    `batchable` whether it can vmap it, and `exact_when_compiled` whether XLA fuses arithmetic on
    the weight itself in the same way in both programs.
    """

    name: str
    fn: Callable[[Params, jax.Array], jax.Array]
    shapes: Mapping[str, tuple[int, ...]]
    x_shape: tuple[int, ...]
    axes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    targets: str = "W.*"
    how: frozenset[str] = frozenset({"factored"})
    reverse: bool = True
    batchable: bool = True
    exact_when_compiled: bool = True
    integer_x: bool = False
    rank: int = 2


CASES: list[Case] = []


def case(
    shapes: Mapping[str, tuple[int, ...]], x_shape: tuple[int, ...], **options: Any
) -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
    def added(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        CASES.append(Case(fn.__name__, fn, shapes, x_shape, **options))
        return fn

    return added
