"""A training step that is compiled once for each length of batches."""

from collections.abc import Callable
from typing import Any

import jax

# What a batch's length is: that of its rows, or several where there are rows of two kinds.
Length = int | tuple[int, ...]


class CompiledSteps:
    """A step for batches of several lengths, of which each has a program of its own.

    Its first two arguments, what trains and the state of its optimiser, give their memory to the
    results.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._compiled: dict[Length, Any] = {}

    def compile(self, length: Length, *arguments: Any) -> None:
        if length not in self._compiled:
            self._compiled[length] = self._step.lower(*arguments).compile()

    def __call__(self, length: Length, *arguments: Any) -> Any:
        self.compile(length, *arguments)
        return self._compiled[length](*arguments)

    @property
    def texts(self) -> list[str]:
        """The compiled programs of all lengths, as text."""
        return [program.as_text() for program in self._compiled.values()]

    @property
    def bytes(self) -> int:
        """The memory of the step of the greatest length: arguments, temporaries, new results."""
        found = self._compiled[max(self._compiled)].memory_analysis()
        sizes = (
            found.argument_size_in_bytes,
            found.output_size_in_bytes,
            found.temp_size_in_bytes,
            -found.alias_size_in_bytes,
        )
        return sum(sizes)
