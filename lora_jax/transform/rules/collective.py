r"""Rules for collectives inside `shard_map`: what moves a weight moves its factors too.

A device holds a shard of the base, and of each factor a shard or the whole. Let i number the
devices along the mesh axes of the collective, so that the value on device i is
$g_i \circ (W_i + \sum_k s_{ki} A_{ki} B_{ki})$. An array
that is the same on all of these devices need not move, and JAX's types say which arrays are: with
`check_vma=True`, the type of x names the mesh axes over which x varies. Without the check a factor
itself says along which axes it is known to be the same: the axes that do not cut it, until
something else is mixed in.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import (
    SHARD_AXIS,
    Equation,
    Primitive,
    as_varying,
    primitive_in_shards,
    primitives,
    varying_axes,
)
from lora_jax.transform._base_shards import gathered_base, varying_axes_of
from lora_jax.transform._bases import moved_bases
from lora_jax.transform._factored import Factored
from lora_jax.transform._interpreter import Interpreter
from lora_jax.transform._terms import Factor, Term
from lora_jax.transform.rules._rule import Rule

# Returns the aligned array of a factor after the collective, or None where it can't be moved alone.
_Move = Callable[["_Group", Factor], Array | None]


@dataclasses.dataclass(frozen=True)
class _Group:
    """The devices between which a collective moves values of a weight.

    Attributes:
      equation: the collective.
      names: the mesh axes that it goes along.
      base: the weight's base, before.
    """

    equation: Equation
    names: frozenset[str]
    base: Any

    def varies(self, factor: Factor) -> bool:
        """Whether a factor may differ between these devices."""
        return self._varies(factor.stored, factor.alike_over)

    def _varies(self, array: Array, alike_over: frozenset[str]) -> bool:
        if self.names <= varying_axes_of(self.base):
            return bool(self.names & varying_axes(array))
        return not self.names <= alike_over

    def has_same_scale(self, term: Term) -> bool:
        """Whether a term has the same scale on all of these devices."""
        return not self._varies(term.scale, term.scale_alike_over)

    def moved(self, array: Array, **params: Any) -> Array:
        """Returns an array with the collective done to it, some of its parameters changed."""
        missing = self.names & varying_axes_of(self.base) - varying_axes(array)
        primitive = self.equation.primitive
        outputs = primitive.bind(as_varying(array, missing), **{**self.equation.params, **params})
        return outputs[0] if primitive.multiple_results else outputs

    def with_same_scale(self, term: Term) -> Term:
        """Returns a term whose scale is the same on all devices; lora_A absorbs one that varies."""
        if self.has_same_scale(term):
            return term
        scaled = Factor.of_aligned(term.lora_A * term.scale.astype(term.lora_A.dtype))
        return dataclasses.replace(
            term,
            factor_A=scaled,
            scale=jnp.ones((), term.scale.dtype),
            scale_alike_over=self.names,
        )


def all_gather(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Any:
    r"""Returns the shards of all devices along one axis, gathered factor by factor.

    Joined along an axis that the weight has, a factor that holds this axis is joined alike, and the
    other one must be the same for all shards: $[A_1 B; A_2 B] = [A_1; A_2] B$. Joined along a new
    axis, both may differ: the new one is a batch axis.
    """
    axis, is_tiled = equation.params["all_gather_dimension"], equation.params["tiled"]

    def moved(group: _Group, factor: Factor) -> Array | None:
        array = factor.aligned
        if not is_tiled:
            return group.moved(array) if group.varies(factor) else jnp.expand_dims(array, axis)
        if array.shape[axis] != 1:
            return group.moved(array)
        return None if group.varies(factor) else array

    return _each_moved(
        equation,
        inputs,
        moved,
        (axis,) if is_tiled else (),
        None if is_tiled else axis,
        functools.partial(_gathered_bases, axis=axis, is_tiled=is_tiled),
    )


def _gathered_bases(
    equation: Equation, inputs: Sequence[Any], *, axis: int, is_tiled: bool
) -> list[Any]:
    """Returns the gathered bases, as codes where a device has whole blocks of them."""
    bases: list[Any] = []
    for value in inputs:
        if not isinstance(value, Factored):
            return moved_bases(equation, inputs)
        group = _group(equation, value)

        def gather(array: Array, at: int, group: _Group = group) -> Array:
            return group.moved(array, all_gather_dimension=at)

        count = equation.params["axis_size"]
        bases.append(gathered_base(value.base, axis, count, gather, is_tiled=is_tiled))
    return moved_bases(equation, inputs) if None in bases else bases


def all_to_all(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Any:
    """Returns pieces of the shards of all devices, exchanged factor by factor.

    A factor that holds the axes which are split and joined is exchanged alike; one that holds
    neither must be the same on all devices.
    """
    params = equation.params
    split, joined, is_tiled = params["split_axis"], params["concat_axis"], params["tiled"]
    axes = {split, joined} if is_tiled else {split}

    def moved(group: _Group, factor: Factor) -> Array | None:
        array = factor.aligned
        held = {axis for axis in axes if array.shape[axis] != 1}
        if held == axes:
            return group.moved(array)
        if held or group.varies(factor):
            return None
        return array if is_tiled else jnp.expand_dims(array.squeeze(split), joined)

    if not is_tiled:
        inputs = [_without_windows(value) for value in inputs]
    return _each_moved(equation, inputs, moved, tuple(axes), None)


def permuted(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Any:
    """Returns the weight of another device, with everything that may differ, or zero.

    A device that receives nothing has a base of zero, so one of its factors must be zero too.
    """
    (value,) = inputs
    group = _group(equation, value)

    def moved(factor: Factor) -> Array:
        return group.moved(factor.aligned) if group.varies(factor) else factor.aligned

    def moved_term(term: Term) -> Term:
        if not group.has_same_scale(term):
            term = dataclasses.replace(
                term, scale=group.moved(term.scale), scale_alike_over=frozenset()
            )
        if group.varies(term.factor_A) or group.varies(term.factor_B):
            return term.moved(moved(term.factor_A), moved(term.factor_B))
        return term.moved(group.moved(term.lora_A), term.lora_B)

    base = moved_bases(equation, inputs)[0]
    gain = value.gain and Factor.of_aligned(moved(value.gain))
    return [Factored(base, tuple(map(moved_term, value.terms)), gain)]


def psum(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Any:
    r"""Returns the sum of the weights of all devices: $\sum_i A_i B = (\sum_i A_i) B$."""

    def moved(group: _Group, factor: Factor) -> Array | None:
        return group.moved(factor.aligned)

    return _each_summed(equation, inputs, moved, lambda factor: factor)


def reduce_scatter(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Any:
    """Returns each device's piece of the sum of all weights; one factor holds the cut axis."""
    axis, is_tiled = equation.params["scatter_dimension"], equation.params["tiled"]

    def moved(group: _Group, factor: Factor) -> Array | None:
        return group.moved(factor.aligned) if factor.aligned.shape[axis] != 1 else None

    def kept(factor: Array) -> Array | None:
        if factor.shape[axis] != 1:
            return None
        return factor if is_tiled else factor.squeeze(axis)

    inputs = [_without_windows(value, (axis,) if is_tiled else None) for value in inputs]
    return _each_summed(equation, inputs, moved, kept)


def _each_moved(
    equation: Equation,
    inputs: Sequence[Any],
    moved: _Move,
    without_windows_on: Sequence[int],
    new_axis: int | None,
    bases_of: Callable[[Equation, Sequence[Any]], list[Any]] = moved_bases,
) -> list[Any] | None:
    """Returns the outputs of a collective that moves each factor on its own, or None."""

    def moved_term(group: _Group, term: Term, base: Any) -> Term | None:
        windows = term.window
        if new_axis is not None:
            windows = (*windows[:new_axis], None, *windows[new_axis:])
        first, second = moved(group, term.factor_A), moved(group, term.factor_B)
        return _with_factors(term, first, second, windows)

    values = [_without_windows(value, without_windows_on) for value in inputs]
    return _each(equation, values, moved_term, moved, bases_of)


def _each_summed(
    equation: Equation,
    inputs: Sequence[Any],
    moved: _Move,
    kept: Callable[[Array], Array | None],
) -> list[Any] | None:
    """Returns the outputs of a collective that sums, which is linear in one factor, or None."""

    def summed_term(group: _Group, term: Term, base: Any) -> Term | None:
        return _summed_term(group, term, moved, kept, base.ndim)

    def kept_gain(group: _Group, gain: Factor) -> Array | None:
        return None if group.varies(gain) else kept(gain.aligned)

    return _each(equation, inputs, summed_term, kept_gain)


def _each(
    equation: Equation,
    inputs: Sequence[Any],
    term_of: Callable[[_Group, Term, Any], Term | None],
    gain_of: _Move,
    bases_of: Callable[[Equation, Sequence[Any]], list[Any]] = moved_bases,
) -> list[Any] | None:
    """Returns the outputs of a collective, or None where a term or a gain has no counterpart.

    Args:
      equation: the collective.
      inputs: its inputs.
      term_of: a function from a term with one scale for all devices, and the new base, to the new
        term.
      gain_of: the same for a gain.
      bases_of: from the collective and its inputs to their bases after it.
    """
    bases = bases_of(equation, inputs)
    outputs: list[Any] = []
    for value, base in zip(inputs, bases, strict=True):
        if not isinstance(value, Factored):
            outputs.append(base)
            continue
        group = _group(equation, value)
        terms = [term_of(group, group.with_same_scale(term), base) for term in value.terms]
        gain = None if value.gain is None else gain_of(group, value.gain)
        if None in terms or (gain is None and value.gain is not None):
            return None
        outputs.append(_factored(base, terms, gain))
    return outputs


def _summed_term(
    group: _Group,
    term: Term,
    moved: _Move,
    kept: Callable[[Array], Array | None],
    ndim: int,
) -> Term | None:
    window = term.window if len(term.window) == ndim else (None,) * ndim
    for summed, other in ((term.factor_A, term.factor_B), (term.factor_B, term.factor_A)):
        if not group.varies(other):
            first, second = moved(group, summed), kept(other.aligned)
            found = _with_factors(term, first, second, window)
            if found is not None:
                return found
    return None


def _with_factors(
    term: Term, lora_A: Array | None, lora_B: Array | None, window: tuple[Any, ...]
) -> Term | None:
    if lora_A is None or lora_B is None:
        return None
    return term.moved(lora_A, lora_B, window)


def _factored(base: Any, terms: Sequence[Term | None], gain: Array | None) -> Factored:
    known = tuple(term for term in terms if term is not None)
    return Factored(base, known, None if gain is None else Factor.of_aligned(gain))


def _group(equation: Equation, value: Factored) -> _Group:
    names = equation.params.get("axis_name", equation.params.get("axes"))
    names = names if isinstance(names, tuple) else (names,)
    return _Group(equation, frozenset(names), value.base)


def _without_windows(value: Any, axes: Collection[int] | None = None) -> Any:
    return value.without_windows(axes) if isinstance(value, Factored) else value


def rules() -> dict[Primitive, Rule]:
    """Returns the rules of collectives, each with and without `check_vma` where JAX has two."""
    axis = SHARD_AXIS
    gathered = primitive_in_shards(
        lambda x: jax.lax.all_gather(x, axis, to="invarying"), check_vma=True
    )
    broadcast = primitive_in_shards(lambda x: jax.lax.pbroadcast(x, (axis,), 0), check_vma=False)
    summed = primitive_in_shards(lambda x: jax.lax.psum(x, axis), check_vma=True)
    scattered = primitive_in_shards(lambda x: jax.lax.psum_scatter(x, axis), check_vma=False)
    return {
        broadcast: Rule(factors=permuted),
        gathered: Rule(factors=all_gather),
        primitives.all_gather_p: Rule(factors=all_gather),
        primitives.all_to_all_p: Rule(factors=all_to_all),
        primitives.ppermute_p: Rule(factors=permuted),
        primitives.psum_p: Rule(factors=psum),
        scattered: Rule(factors=reduce_scatter),
        summed: Rule(factors=psum),
    }
