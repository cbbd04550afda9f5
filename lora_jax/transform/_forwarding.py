"""Which outputs of a function are inputs that it only hands on."""

from typing import Any

from lora_jax._compat import Jaxpr, Literal, called_jaxpr


def input_behind(jaxpr: Jaxpr, atom: Any) -> Any | None:
    """Returns the input that `atom` is, also through calls that hand it on, or None."""
    if isinstance(atom, Literal):
        return None
    definitions = {output: equation for equation in jaxpr.eqns for output in equation.outvars}
    while atom in definitions:
        equation = definitions[atom]
        body = called_jaxpr(equation)
        if body is None:
            return None
        inner = input_behind(body, body.outvars[equation.outvars.index(atom)])
        if inner is None:
            return None
        atom = equation.invars[body.invars.index(inner)]
        if isinstance(atom, Literal):
            return None
    return atom if atom in jaxpr.invars else None
