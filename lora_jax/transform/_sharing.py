"""Inner functions that the model jits: each is rewritten once for all calls that are alike."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from lora_jax.transform._factored import Factored
from lora_jax.transform._report import Use
from lora_jax.transform._terms import Term


@dataclasses.dataclass(frozen=True)
class Place:
    """Stands for a weight inside a shared function, where only its position counts.

    The label is the path of the weight that the function was traced with, for messages.
    """

    index: int
    label: str = dataclasses.field(compare=False)

    def __str__(self) -> str:
        return self.label


@dataclasses.dataclass(frozen=True)
class SharedFunction:
    """A rewritten and jitted inner function, and how it uses the weights that it takes.

    Attributes:
      call: the function, of which JAX keeps one copy in the lowered program.
      labels: the names of its weights in `uses`, in order of position.
      uses: the equations that an adapted weight reached inside.
    """

    call: Callable[..., Any]
    labels: tuple[str, ...]
    uses: tuple[Use, ...]

    def uses_of(self, origins: Sequence[Hashable]) -> list[Use]:
        """Returns the uses of the weights that one call passes.

        Args:
          origins: where the weights come from, one for each position.
        """
        paths = dict(zip(self.labels, map(str, origins), strict=True))
        return [dataclasses.replace(use, path=paths[use.path]) for use in self.uses]


class SharedFunctions:
    """A memo of the inner functions that one call of an adapted function has rewritten.

    A signature holds everything that rewriting depends on, so rewriting again would give the same
    function: the jaxpr and settings, and the structure, shapes and dtypes of the arguments, with or
    without a dropout key.
    """

    def __init__(self) -> None:
        """Makes an empty memo."""
        self._by_signature: dict[Hashable, SharedFunction] = {}

    def get(self, signature: Hashable) -> SharedFunction | None:
        """Returns the function with this signature, or None if there is none yet."""
        return self._by_signature.get(signature)

    def add(self, signature: Hashable, function: SharedFunction) -> None:
        """Stores a function under this signature."""
        self._by_signature[signature] = function


def origins_of(values: Sequence[Any]) -> list[Hashable]:
    """Returns where the terms of the factored values come from, each once."""
    terms = [term for value in values if isinstance(value, Factored) for term in value.terms]
    return list(dict.fromkeys(term.origin for term in terms))


def with_origins(values: Sequence[Any], origins: Mapping[Any, Any]) -> list[Any]:
    """Returns the values with each term's origin replaced."""

    def moved(term: Term) -> Term:
        return dataclasses.replace(term, origin=origins[term.origin])

    return [
        dataclasses.replace(value, terms=tuple(map(moved, value.terms)))
        if isinstance(value, Factored)
        else value
        for value in values
    ]
