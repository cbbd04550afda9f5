"""Which rule covers which primitive: one file for each family of primitives.

A family's file holds every interpretation of a primitive side by side: what it computes with
factors, which roles it gives to axes, and which rows it multiplies a weight by. A rule is
registered on the primitive itself, so a primitive that JAX no longer has fails here. A new rule is
one function and one row in `rules()` of its family.
"""

import functools
from collections.abc import Mapping

from lora_jax._compat import Primitive
from lora_jax.transform._interpreter import Evaluation
from lora_jax.transform.rules import (
    arithmetic,
    calls,
    collective,
    conv,
    custom,
    dot,
    gather,
    loops,
    parts,
    placement,
    ragged_dot,
    reshape,
    shard_map,
    structure,
)
from lora_jax.transform.rules._rule import Rule

_FAMILIES = (
    structure,
    reshape,
    parts,
    arithmetic,
    placement,
    dot,
    ragged_dot,
    conv,
    gather,
    calls,
    loops,
    shard_map,
    custom,
    collective,
)


@functools.cache
def rules() -> Mapping[Primitive, Rule]:
    """Returns the rule of each primitive that has one."""
    return {primitive: rule for family in _FAMILIES for primitive, rule in family.rules().items()}


def with_factors() -> Mapping[Primitive, Evaluation]:
    """Returns the evaluation of each primitive that computes with factors."""
    return {primitive: rule.factors for primitive, rule in rules().items()}


def with_roles() -> Mapping[Primitive, Evaluation]:
    """Returns the evaluation of each primitive that records the roles of axes."""
    return {primitive: rule.roles or rule.factors for primitive, rule in rules().items()}


def with_rows() -> Mapping[Primitive, Evaluation]:
    """Returns the evaluation of each primitive that records the rows of weights."""
    return {primitive: rule.rows or rule.factors for primitive, rule in rules().items()}
