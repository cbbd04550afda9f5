"""Arguments that are not arrays, as parts of a tree's structure."""

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._compat import Jaxpr, Var, inner_jaxprs
from lora_jax._identity import Same, is_hashable
from lora_jax._weight import has_factors


class NotComparableError(TypeError):
    """An argument can't be compared with that of another call."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A leaf that is not an array, as a part of the tree's structure.

    Attributes:
      value: the leaf.
      identity: what it is compared by: the leaf itself, or a copy if the leaf can change; None if
        it is not compared.
    """

    value: Any
    identity: Any

    def __hash__(self) -> int:
        return hash((type(self.value), self.identity if is_hashable(self.identity) else None))

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, Static)
            and type(self.value) is type(other.value)
            and bool(self.identity == other.identity)
        )


def with_static(tree: Any, *, comparable: bool = False, trace_floats: bool = False) -> Any:
    """Returns a tree whose leaves are all arrays; all others become static.

    Args:
      tree: any tree; adapters in it become arrays.
      comparable: whether its structure will be compared with that of other trees.
      trace_floats: whether Python floats and complex numbers are left to be traced.

    Raises:
      NotComparableError: with `comparable`, a leaf can be neither hashed nor copied and compared.
    """

    def array_or_static(leaf: Any) -> Any:
        if has_factors(leaf):
            return jax.tree.map(lambda each: each if is_array(each) else jnp.asarray(each), leaf)
        if is_array(leaf) or (trace_floats and is_number(leaf)):
            return leaf
        return Static(leaf, _identity(leaf) if comparable else None)

    return jax.tree.map(array_or_static, tree, is_leaf=has_factors)


def without_static(tree: Any) -> Any:
    """Returns a tree with the leaves that `with_static` made static."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, Static) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Static),
    )


def is_array(leaf: Any) -> bool:
    """Says whether a leaf is an array of a dtype that JAX has, concrete or not."""
    if isinstance(leaf, type) or not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return False
    kinds = (jnp.number, jnp.bool_, jax.dtypes.extended, jax.dtypes.float0)
    return any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)


def is_number(leaf: Any) -> bool:
    """Says whether a leaf is a Python float or complex number that an array of JAX can hold."""
    if not isinstance(leaf, float | complex) or is_array(leaf):
        return False
    with np.errstate(over="ignore", under="ignore"):
        held = jnp.result_type(leaf).type(leaf)
    return bool(np.isfinite(held) == np.isfinite(leaf)) and bool(held) == bool(leaf)


def computes_with_numbers(jaxpr: Jaxpr) -> bool:
    """Says whether anything is computed from Python numbers alone, before they meet an array.

    Python computes it in float64, JAX in the narrower dtype of its arrays, where 1 - 0.99999999 is
    zero.
    """
    return any(
        any(map(computes_with_numbers, inner_jaxprs(equation)))
        if inner_jaxprs(equation)
        else equation.primitive.name not in _HANDED_ON
        and any(isinstance(atom, Var) for atom in equation.invars)
        and all(map(_is_of_numbers, equation.invars))
        for equation in jaxpr.eqns
    )


_HANDED_ON = frozenset({"broadcast_in_dim", "convert_element_type", "copy"})


def _is_of_numbers(atom: Any) -> bool:
    aval = atom.aval
    is_scalar = getattr(aval, "shape", None) == () and getattr(aval, "weak_type", False)
    return bool(is_scalar and jnp.issubdtype(aval.dtype, jnp.inexact))


def _identity(leaf: Any) -> Any:
    if isinstance(leaf, float | complex):
        return repr(leaf)  # 0.0 and -0.0 are equal, and nan is not even equal to itself
    if isinstance(leaf, functools.partial):
        return _snapshot(leaf.func), _snapshot(leaf.args), _snapshot(leaf.keywords)
    own_hash: Any = type(leaf).__hash__
    if own_hash is object.__hash__:
        # It equals itself whatever it holds, and its contents may change between two calls.
        return leaf, _snapshot(getattr(leaf, "__dict__", None))
    if is_hashable(leaf):
        return leaf
    try:
        identity = copy.deepcopy(leaf)
        is_equal = identity == leaf
    except Exception as error:
        raise NotComparableError(f"{leaf!r} can't be copied and compared.") from error
    if is_equal is not True:
        raise NotComparableError(f"{leaf!r} can't be compared with a copy of itself.")
    return identity


def _snapshot(value: Any) -> Any:
    """Returns what shows whether a value has changed: numbers, text, and identities.

    Containers are searched; other objects are known by their identity.
    """
    if isinstance(value, dict):
        return tuple((_snapshot(key), _snapshot(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return (type(value), *map(_snapshot, value))
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        return type(value), repr(value)
    return Same(value)
