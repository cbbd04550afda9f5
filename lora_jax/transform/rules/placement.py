"""Where the arrays of a factored weight go when the model puts the weight somewhere.

A factor goes where the weight goes: onto the same device, into the same memory, and cut in the
same way on the axes that it holds. The rank is not cut.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.layout import Format
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from lora_jax._compat import Equation, Primitive, emitted_primitive, primitives
from lora_jax.transform._base_shards import base_for_shards, placed_base
from lora_jax.transform._bases import base_of, moved_bases
from lora_jax.transform._deferred import is_deferred
from lora_jax.transform._factored import Factored
from lora_jax.transform._interpreter import Interpreter
from lora_jax.transform._terms import Factor, Rows, Term
from lora_jax.transform.rules._rule import Rule


def device_put(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns each value on its device or in its memory, the factors of a weight beside it."""
    places = equation.params["devices"]
    bases = _placed_bases(equation, inputs, places, _put)
    return [
        placed(value, base, where, _put) if isinstance(value, Factored) else base
        for value, base, where in zip(inputs, bases, places, strict=True)
    ]


def _put(array: Array, where: Any) -> Array:
    return jax.device_put(array, where)


def sharding_constraint(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> list[Any]:
    """Returns the weight cut as the model says, and its factors in the same way."""
    return [
        _constrained(
            equation, inputs[0], equation.params["sharding"], jax.lax.with_sharding_constraint
        )
    ]


def reshard(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight, and its factors, cut over explicit axes as the model says."""
    return [
        _constrained(equation, inputs[0], equation.params["dst_sharding"], jax.sharding.reshard)
    ]


def _constrained(
    equation: Equation, value: Factored, sharding: Any, put: Callable[[Array, Any], Array]
) -> Factored:
    return placed(value, _placed_bases(equation, [value], [sharding], put)[0], sharding, put)


def _placed_bases(
    equation: Equation,
    inputs: Sequence[Any],
    places: Sequence[Any],
    put: Callable[[Array, Any], Array],
) -> list[Any]:
    """Returns the bases where the equation puts them; a deferred one is put part by part."""
    if not any(is_deferred(base_of(value)) for value in inputs):
        return moved_bases(equation, inputs)
    return [
        placed_base(base_of(value), where, put) for value, where in zip(inputs, places, strict=True)
    ]


def placed(value: Factored, base: Any, where: Any, put: Callable[[Array, Any], Array]) -> Factored:
    """Returns a weight whose base was put somewhere, with its factors and scales there too.

    Args:
      value: the weight.
      base: its base, where it was put.
      where: a device, a memory space, a sharding of the weight, or one with a layout of its base.
      put: puts an array onto one of these.
    """
    where = where.sharding if isinstance(where, Format) else where
    terms = tuple(_placed_term(term, where, put) for term in value.terms)
    gain = value.gain and _placed_factor(value.gain, where, put)
    return dataclasses.replace(value, base=base, terms=terms, gain=gain)


def _placed_term(term: Term, where: Any, put: Callable[[Array, Any], Array]) -> Term:
    """Returns a term with its arrays where its weight was put; single rows of it are not cut."""
    whole = _with_spec(where, PartitionSpec())
    if isinstance(where, NamedSharding):
        cuts = zip(where.spec, term.window, strict=False)
        spec = [None if isinstance(window, Rows) else cut for cut, window in cuts]
        where = _with_spec(where, PartitionSpec(*spec))
    return dataclasses.replace(
        term,
        factor_A=_placed_factor(term.factor_A, where, put),
        factor_B=_placed_factor(term.factor_B, where, put),
        scale=put(term.scale, whole),
        window=jax.tree.map(lambda places: put(places, whole), term.window),
    )


def _placed_factor(factor: Factor, where: Any, put: Callable[[Array, Any], Array]) -> Factor:
    return factor.with_stored(put(factor.stored, _of(factor, where)))


def cut_for(value: Factored, mesh: Any, spec: Any) -> Factored:
    """Returns a value that can be cut over a mesh as a function of shards asks.

    Over explicit axes its factors are cut here; over the other ones JAX cuts on its own.
    """
    explicit = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    if not explicit:
        shards = base_for_shards(value.base, spec, dict(mesh.shape))
        return dataclasses.replace(value, base=shards)

    def cut(factor: Factor) -> Factor:
        spec_of_factor = PartitionSpec(*(_within(axis, explicit) for axis in factor.spec(spec)))
        where = NamedSharding(mesh, spec_of_factor)
        return factor.with_stored(jax.sharding.reshard(factor.stored, where))

    base = value.base
    if is_deferred(base):
        # An array is cut so already, as the model's function asks for it.
        cuts = PartitionSpec(*(_within(axis, explicit) for axis in spec))
        shards = base_for_shards(base, spec, dict(mesh.shape))
        base = placed_base(shards, NamedSharding(mesh, cuts), jax.sharding.reshard)
    return dataclasses.replace(value.map_factors(cut), base=base)


def _within(axis: Any, names: set[str]) -> Any:
    """Returns the mesh axes that cut one axis, without those that are not in `names`."""
    kept = tuple(name for name in (axis if isinstance(axis, tuple) else (axis,)) if name in names)
    return kept or None


def _of(factor: Factor, where: Any) -> Any:
    spec = tuple(where.spec) if isinstance(where, NamedSharding) else ()
    return _with_spec(where, factor.spec(spec))


def _with_spec(where: Any, spec: PartitionSpec) -> Any:
    if not isinstance(where, NamedSharding):
        return where
    return NamedSharding(where.mesh, spec, memory_kind=where.memory_kind)


def rules() -> dict[Primitive, Rule]:
    """Returns the rules of ops that put a weight somewhere."""
    mesh = AbstractMesh((1,), ("i",), axis_types=(AxisType.Explicit,))
    cut = NamedSharding(mesh, PartitionSpec("i"))
    return {
        emitted_primitive(
            lambda x: jax.sharding.reshard(x, cut), jax.ShapeDtypeStruct((1,), "float32")
        ): Rule(factors=reshard),
        primitives.device_put_p: Rule(factors=device_put),
        primitives.sharding_constraint_p: Rule(factors=sharding_constraint),
    }
