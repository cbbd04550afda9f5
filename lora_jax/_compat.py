"""All contact with `jax.extend`, and all that differs between JAX versions."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.extend import core

ClosedJaxpr = core.ClosedJaxpr
Equation = core.JaxprEqn
Jaxpr = core.Jaxpr
Literal = core.Literal
Var = core.Var

_OWN_FOLDERS = tuple(
    str(Path(module_file).resolve().parent) + os.sep for module_file in (jax.__file__, __file__)
)

# Equations whose body sees other values than they do: one layer, one branch, one shard.
_LOOPS = frozenset({"cond", "scan", "shard_map", "while"})


def is_tracer(value: Any) -> bool:
    """Says whether `value` is being traced, so that it has no concrete numbers."""
    return isinstance(value, jax.core.Tracer)


def evaluate(closed_jaxpr: ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    """Returns the outputs of a jaxpr, each equation evaluated with its own source information."""
    return core.jaxpr_as_fun(closed_jaxpr)(*values)


def evaluate_equation(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Returns the outputs of one equation for `values`, one for each of its inputs.

    The equation is evaluated as a jaxpr of its own, which is the public way to keep its source
    line, its named scopes and the settings under which it was traced.
    """
    inputs = {
        atom: value
        for atom, value in zip(equation.invars, values, strict=True)
        if isinstance(atom, Var)
    }
    names = core.DebugInfo(
        traced_for="adapt",
        func_src_info=equation.primitive.name,
        arg_names=("",) * len(inputs),
        result_paths=("",) * len(equation.outvars),
    )
    jaxpr = Jaxpr(
        (), list(inputs), equation.outvars, [equation], equation.effects, debug_info=names
    )
    return evaluate(ClosedJaxpr(jaxpr, ()), list(inputs.values()))


def name_scope(equation: Equation) -> str:
    """Returns the named scopes in which the model computes `equation`, `/`-joined."""
    return str(equation.source_info.name_stack)


def source_line(equation: Equation) -> str | None:
    """Returns the line of the model's own source that `equation` comes from, if it is known."""
    traceback: Any = equation.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not frame.file_name.startswith((*_OWN_FOLDERS, "<")):
            file_name = frame.file_name.rpartition("site-packages" + os.sep)[2]
            return f"{file_name}:{frame.line_num} ({frame.function_name})"
    return None


def scan_counts(equation: Equation) -> tuple[int, int]:
    """Returns how many inputs of a scan are constants and how many are carried."""
    if "ft_in" in equation.params:  # JAX 0.11
        constants, carried, _ = equation.params["ft_in"].unpack()
        return len(constants), len(carried)
    return equation.params["num_consts"], equation.params["num_carry"]


def called_jaxpr(equation: Equation) -> Jaxpr | None:
    """Returns the body of an equation that calls one function once on its inputs, or None."""
    if equation.primitive.name in _LOOPS:
        return None
    for name in ("jaxpr", "call_jaxpr"):
        body = equation.params.get(name)
        body = body.jaxpr if isinstance(body, ClosedJaxpr) else body
        if isinstance(body, Jaxpr) and len(body.invars) == len(equation.invars):
            return body
    return None
