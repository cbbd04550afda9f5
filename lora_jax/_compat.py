"""All contact with `jax.extend`, and all that differs between JAX versions."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as listed_primitives
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

ClosedJaxpr = core.ClosedJaxpr
Equation = core.JaxprEqn
Jaxpr = core.Jaxpr
Literal = core.Literal
Primitive = core.Primitive
Var = core.Var
primitives = listed_primitives

# As they were imported, which is how frames name them, and where links lead.
_OWN_FOLDERS = tuple(
    str(folder) + os.sep
    for module_file in (jax.__file__, __file__)
    for folder in (Path(module_file).parent, Path(module_file).resolve().parent)
)
# What checks annotations at run time, where a user has jaxtyping's import hook.
_CHECKERS = (str(Path(jaxtyping.__file__).parent) + os.sep, "<@beartype")
_WRAPPERS = (contextlib.__file__, functools.__file__, *_CHECKERS)

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
    equation = _with_own_variables(equation, values)
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


def _with_own_variables(equation: Equation, values: Sequence[Any]) -> Equation:
    """Returns the equation with a variable for each operand.

    The model may use one value twice, or a constant, where the operands differ here: one built or
    scaled, the other unchanged.
    """
    variables = [atom for atom in equation.invars if isinstance(atom, Var)]
    changed = [
        isinstance(atom, Literal) and value is not atom.val
        for atom, value in zip(equation.invars, values, strict=True)
    ]
    if len(set(variables)) == len(variables) and not any(changed):
        return equation
    return equation.replace(
        invars=[
            Var(atom.aval) if isinstance(atom, Var) or is_changed else atom
            for atom, is_changed in zip(equation.invars, changed, strict=True)
        ]
    )


def emitted_primitive(function: Callable[..., Any], *arguments: Any) -> Primitive:
    """Returns the primitive to which a public function of JAX traces first.

    That is the way to the primitives that JAX does not name in public.

    Args:
      function: the function.
      *arguments: the shapes of its arguments.
    """
    return _traced_without_mesh(function, *arguments).eqns[0].primitive


def primitive_in_shards(
    function: Callable[[Any], Any], *, check_vma: bool, is_cut: bool = True
) -> Primitive:
    """Returns the primitive to which a function traces first within `jax.shard_map`.

    Args:
      function: a function of a shard of shape (1, 1), along the mesh axis `SHARD_AXIS`.
      check_vma: as for `jax.shard_map`.
      is_cut: whether the shard varies along the mesh axis.
    """
    mapped, shard = one_shard(function, check_vma=check_vma, is_cut=is_cut)
    body = _traced_without_mesh(mapped, shard).eqns[0].params["jaxpr"]
    return body.eqns[0].primitive


# A name that no surrounding mesh or `jax.vmap` of a model has.
SHARD_AXIS = "lora_jax_shard"


def one_shard(
    function: Callable[[Any], Any], *, check_vma: bool = True, is_cut: bool = True
) -> tuple[Callable[[Any], Any], jax.ShapeDtypeStruct]:
    """Returns a function mapped over a mesh of one device, and the shape of its argument."""
    mapped = jax.shard_map(
        function,
        mesh=AbstractMesh((1,), (SHARD_AXIS,), axis_types=(AxisType.Auto,)),
        in_specs=PartitionSpec(SHARD_AXIS if is_cut else None),
        out_specs=PartitionSpec(SHARD_AXIS),
        check_vma=check_vma,
    )
    return mapped, jax.ShapeDtypeStruct((1, 1), "float32")


def _traced_without_mesh(function: Callable[..., Any], *arguments: Any) -> Jaxpr:
    """Returns the jaxpr of a function, whatever mesh the caller's context has."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return jax.make_jaxpr(function)(*arguments).jaxpr


def settings_of(equation: Equation) -> AbstractContextManager[Any]:
    """Returns a context with the settings under which `equation` was traced.

    Among them are the mesh, the kind of compute and metadata for XLA.
    """
    return equation.ctx.manager


def rebound(equation: Equation, body: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
    """Returns the outputs of a rematerialised equation with another body on other arguments.

    Every parameter of the original is kept. `differentiated`, which says that the equation belongs
    to a backward pass and is to be lowered behind barriers, has no other way in.
    """
    leaves, structure = jax.tree.flatten(tuple(arguments))
    closed_jaxpr, outputs = jax.make_jaxpr(
        lambda *leaves: body(*jax.tree.unflatten(structure, leaves)), return_shape=True
    )(*leaves)
    jaxpr = closed_jaxpr.jaxpr
    variables = [*jaxpr.constvars, *jaxpr.invars]
    names = jaxpr.debug_info._replace(arg_names=("",) * len(variables))
    opened = Jaxpr((), variables, jaxpr.outvars, jaxpr.eqns, jaxpr.effects, debug_info=names)
    params = {**equation.params, "jaxpr": opened}
    if isinstance(params["prevent_cse"], tuple):
        # A choice for each input; one that is factored has several arrays here.
        counts = [len(jax.tree.leaves(argument)) for argument in arguments]
        first = len(counts) - len(params["prevent_cse"])
        chosen = [False] * (len(jaxpr.constvars) + sum(counts[:first]))
        for choice, count in zip(params["prevent_cse"], counts[first:], strict=True):
            chosen += [choice] * count
        params["prevent_cse"] = tuple(chosen)
    results = equation.primitive.bind(*closed_jaxpr.consts, *leaves, **params)
    return jax.tree.unflatten(jax.tree.structure(outputs), results)


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


def without_mesh() -> AbstractContextManager[Any]:
    """Returns a context in which a program runs where its arrays are, whatever mesh the caller has.

    It does not work under a transformation.
    """
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def mesh_of(array: Any) -> AbstractContextManager[Any]:
    """Returns a context with the mesh of an array's type, which may be another than the caller's.

    A model may have axes of its mesh automatic for some equations, and explicit for others.
    """
    mesh = jax.typeof(array).sharding.mesh
    if mesh.empty or mesh == jax.sharding.get_abstract_mesh():
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def varying_axes(array: Any) -> frozenset[str]:
    """Returns the mesh axes over which an array in `shard_map` varies, if `check_vma` is on."""
    return jax.typeof(array).manual_axis_type.varying


def as_varying(array: Any, names: Collection[str]) -> Any:
    """Returns an array in `shard_map` as one that varies over these mesh axes too."""
    return jax.lax.pcast(array, tuple(sorted(names)), to="varying") if names else array


def callers_level() -> int:
    """Returns the `stacklevel` with which the calling function's warning points at the user's code.

    That is the innermost frame outside of this library and JAX.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_CHECKERS):
        frame = frame.f_back
    level = 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(
        (*_OWN_FOLDERS, *_WRAPPERS)
    ):
        frame = frame.f_back
        level += 1
    return level


def as_closed(jaxpr: Any) -> ClosedJaxpr:
    """Returns a jaxpr without constants, or one that is closed already, as a closed one."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


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


def inner_jaxprs(equation: Equation) -> list[Jaxpr]:
    """Returns the bodies of an equation: of a call, of each branch, of a loop and its test."""
    parameters = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, Jaxpr | ClosedJaxpr)
    )
    return [
        each.jaxpr if isinstance(each, ClosedJaxpr) else each
        for each in parameters
        if isinstance(each, Jaxpr | ClosedJaxpr)
    ]
