"""The rule for `shard_map`: factors are cut over the mesh as their weight is."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import PRNGKeyArray

from lora_jax._compat import Equation, Primitive, emitted_primitive, one_shard
from lora_jax.transform._base_shards import base_specs, local_base
from lora_jax.transform._building import materialized
from lora_jax.transform._factored import Factored
from lora_jax.transform._interpreter import Interpreter, scope_of
from lora_jax.transform._terms import Factor
from lora_jax.transform.rules._rule import Rule
from lora_jax.transform.rules.placement import cut_for


def shard_map(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of a function that runs on each shard: factors are cut as W is."""
    mesh, in_specs = equation.params["mesh"], equation.params["in_specs"]
    names = equation.params["newly_manual_axes"]
    values = [
        _for_shards(value, mesh, spec, names) for value, spec in zip(inputs, in_specs, strict=True)
    ]
    specs = [
        _factored_specs(value, spec, mesh) for value, spec in zip(values, in_specs, strict=True)
    ]

    def body(key: PRNGKeyArray | None, *arguments: Any) -> list[Any]:
        arguments = tuple(
            _on_shard(value, spec, mesh) for value, spec in zip(arguments, in_specs, strict=True)
        )
        shard = interpreter.within(equation)
        if equation.params["check_vma"]:
            # The axes that an array varies over are known where dropout is applied.
            shard = shard.with_key(key).within_mesh(frozenset(names))
        else:
            shard = shard.with_key(_key_of_shard(key, names))
        outputs = shard.run_open(equation.params["jaxpr"], (), arguments)
        return materialized(shard.reporter, equation, outputs)

    rewritten = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec(), *specs),
        out_specs=list(equation.params["out_specs"]),
        axis_names=names,
        check_vma=equation.params["check_vma"],
    )
    with scope_of(equation):
        return rewritten(interpreter.dropout.key_of(), *values)


def _key_of_shard(key: PRNGKeyArray | None, axes: Iterable[str]) -> PRNGKeyArray | None:
    """Returns a separate key for each shard, so that no two shards share a mask."""
    if key is None:
        return None
    for axis in sorted(axes):
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def _for_shards(value: Any, mesh: Any, spec: Any, names: Collection[str]) -> Any:
    """Returns a value as a function of shards takes it.

    Its factors say along which of the mesh axes `names` every device gets the same.
    """
    if not isinstance(value, Factored):
        return value

    def replicated(factor: Factor) -> Factor:
        cut = jax.tree.leaves(tuple(factor.spec(spec)))
        alike_over = factor.alike_over | frozenset(names) - frozenset(cut)
        return dataclasses.replace(factor, alike_over=alike_over, slot=None)

    value = cut_for(value.without_windows(), mesh, spec).map_factors(replicated)
    terms = tuple(
        dataclasses.replace(term, scale_alike_over=term.scale_alike_over | frozenset(names))
        for term in value.terms
    )
    return dataclasses.replace(value, terms=terms)


def _on_shard(value: Any, spec: Any, mesh: Any) -> Any:
    """Returns a value that one shard was given as the function of shards takes it."""
    if not isinstance(value, Factored):
        return value
    return dataclasses.replace(value, base=local_base(value.base, spec, dict(mesh.shape)))


def _factored_specs(value: Any, spec: Any, mesh: Any) -> Any:
    """Returns the spec of each array of a factored weight: that of W, where the array holds it."""
    if not isinstance(value, Factored):
        return spec

    def spec_of(factor: Factor) -> Any:
        of_stored: Any = factor.spec(spec)
        return factor.with_stored(of_stored)

    specs: Any = value.map_factors(spec_of)
    terms = tuple(dataclasses.replace(term, scale=PartitionSpec()) for term in specs.terms)
    base = base_specs(value.base, spec, dict(mesh.shape))
    return dataclasses.replace(specs, base=base, terms=terms)


def rules() -> dict[Primitive, Rule]:
    """Returns the rule of `shard_map`."""
    function, shard = one_shard(lambda x: x)
    return {emitted_primitive(function, shard): Rule(factors=shard_map)}
