"""The equations of a jaxpr, those of the functions inside too."""

from collections.abc import Iterator
from typing import Any

from lora_jax._compat import inner_jaxprs


def equations(jaxpr: Any, name: str | None = None) -> Iterator[Any]:
    """Yields every equation of a jaxpr and of the jaxprs inside, or those of one primitive."""
    for equation in jaxpr.eqns:
        if name is None or equation.primitive.name == name:
            yield equation
        for inner in inner_jaxprs(equation):
            yield from equations(inner, name)
