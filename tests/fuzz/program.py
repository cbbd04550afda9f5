"""A program as data: its weights, its lines, and the function that they are."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tests.battery.bases import Base
from tests.battery.layouts import Layout
from tests.battery.options import Option
from tests.battery.registry import contracted, rows, squared, traced
from tests.battery.transforms import Transform


def custom(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function with a derivative rule of its own."""
    with_rule = jax.custom_jvp(function)
    with_rule.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return with_rule


_NAMES = {each.__name__: each for each in (contracted, custom, rows, squared, traced)} | {
    "jax": jax,
    "jnp": jnp,
}


@dataclasses.dataclass(frozen=True)
class Value:
    """A variable of a program: its name, its shape, and whether it is a result."""

    name: str
    shape: tuple[int, ...]
    is_result: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Line:
    """`value = expression`, and the names that the expression reads."""

    value: Value
    expression: str
    reads: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.value.name} = {self.expression}  # {self.value.shape}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of weights and activations, as text.

    Attributes:
      weights: the layout, the option, the rank and the base of each weight.
      lines: what it computes, one after the other.
      transform: what is done to it.
      seed: what the numbers are drawn from.
    """

    weights: Mapping[str, tuple[Layout, Option, int, Base]]
    lines: tuple[Line, ...]
    transform: Transform
    seed: tuple[int, int]

    @property
    def results(self) -> list[str]:
        return [line.value.name for line in self.lines if line.value.is_result]

    def only(self, result: str) -> "Program":
        """Returns what of the program one of its results needs."""
        needed = {result}
        kept: list[Line] = []
        for line in reversed(self.lines):
            if line.value.name in needed:
                needed.update(line.reads)
                kept.append(line)
        return dataclasses.replace(self, lines=tuple(reversed(kept)))

    def __str__(self) -> str:
        weights = [
            f"# {name}: {layout.axes}, {layout.shape}, rank {rank}, {option.name}, {base.name}"
            for name, (layout, option, rank, base) in self.weights.items()
        ]
        lines = [*map(str, self.lines), f"return {', '.join(self.results)}"]
        head = [f"# seed {self.seed[0]}, case {self.seed[1]}, {self.transform.name}", *weights]
        return "\n".join([*head, "def program(p, x):", *(f"    {line}" for line in lines)])

    def function(self) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
        """Returns the program as a function `(params, x) -> results`."""

        def run(params: Any, x: jax.Array) -> dict[str, jax.Array]:
            dtype = next(iter(params.values())).dtype
            values = {"p": params, "x": x.astype(dtype)}
            for line in self.lines:
                values[line.value.name] = eval(line.expression, _NAMES | values)
            return {name: values[name] for name in self.results}

        return run
