"""The rule for `gather`: embedding lookup, and picking a layer or an expert out of a stack."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax._compat import Equation, Primitive, primitives
from lora_jax._shapes import AxisRole, Size
from lora_jax.transform._bases import computed_with_bases, moved_bases
from lora_jax.transform._deferred import batch_ndim
from lora_jax.transform._dense import dense_flops, dense_value
from lora_jax.transform._factored import Factored
from lora_jax.transform._interpreter import Interpreter, scope_of
from lora_jax.transform._report import Use
from lora_jax.transform._roles import note_roles
from lora_jax.transform._terms import Factor, Rows, Term, without_windows
from lora_jax.transform.rules._rule import Rule


def gather(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any] | None:
    """Returns rows of the weight: rows of each factor that holds the looked-up axes.

    An axis that both factors hold is a batch axis, and the picked part is still a weight. If only
    one factor holds it, as in an embedding, the result is activations: its rows times the other.
    """
    value, indices = inputs
    if not isinstance(value, Factored) or isinstance(indices, Factored):
        return None
    looked_up = _looked_up_axes(equation, value.shape)
    row_axis = _row_axis(equation, looked_up)
    terms = [
        term if _is_of_rows(term, row_axis) else without_windows(term, value.shape)
        for term in value.terms
    ]
    holding = [_holding(term, looked_up) for term in terms]
    if (
        None in holding
        or equation.params["dimension_numbers"].operand_batching_dims
        or not _fills_alike(equation, value, looked_up, holding)
    ):
        return None
    gives_weight = "one" not in holding and (bool(terms) or _picks_matrices(value, looked_up))
    # A weight that is picked out of a stack stays one; rows are activations.
    base = (moved_bases if gives_weight else computed_with_bases)(equation, inputs)[0]
    picked = tuple(
        _picked_rows(equation, term, indices, base, value.shape)
        if _is_of_rows(term, row_axis)
        else term.moved(
            _picked(equation, term.lora_A, indices, looked_up, base),
            _picked(equation, term.lora_B, indices, looked_up, base),
            (None,) * base.ndim,
        )
        for term in terms
    )
    gain = value.gain and Factor.of_aligned(
        _picked(equation, value.gain.aligned, indices, looked_up, base)
    )
    rows = Factored(base, picked, gain)
    if gives_weight:
        return [rows]
    source = interpreter.reporter.source_of(equation)
    for path, part in rows.parts().items():
        flops = sum(2 * term.rank * base.size for term in part.terms)
        use = Use(path, "gather", source, "factored", 0, flops, dense_flops(part))
        interpreter.reporter.tell(use)
    with scope_of(equation), jax.named_scope("lora"):
        kept = tuple(
            _rows_dropped_out(interpreter, equation, term, use, base.shape)
            for use, term in enumerate(picked)
        )
        return [dense_value(dataclasses.replace(rows, terms=kept))]


def roles(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any] | None:
    """Records a lookup of rows, or follows the weights that are picked out of a stack."""
    value, _ = inputs
    numbers = equation.params["dimension_numbers"]
    if not isinstance(value, Factored) or numbers.operand_batching_dims:
        return None
    looked_up = _looked_up_axes(equation, value.shape)
    picked = computed_with_bases(equation, inputs)[0]
    if value.ndim - len(looked_up) < 2:
        own: list[AxisRole] = ["in" if axis in looked_up else "out" for axis in range(value.ndim)]
        note_roles(interpreter, equation, value, own)
        return [picked]

    def first(probe: Array) -> Array:
        for axis in looked_up:
            probe = jax.lax.slice_in_dim(probe, 0, 1, axis=axis)
        return probe

    terms = tuple(
        term.moved(
            _aligned_with_offsets(first(term.lora_A), numbers, picked.ndim),
            _aligned_with_offsets(term.lora_B, numbers, picked.ndim),
            (None,) * picked.ndim,
        )
        for term in (without_windows(term, value.shape) for term in value.terms)
    )
    return [Factored(picked, terms)]


def _picks_matrices(value: Factored, looked_up: Sequence[int]) -> bool:
    """Says whether a lookup in a weight without terms picks whole matrices out of a stack."""
    return all(axis < batch_ndim(value.base) for axis in looked_up)


def _fills_alike(
    equation: Equation, value: Factored, looked_up: Sequence[int], holding: Sequence[str | None]
) -> bool:
    """Says whether an index out of bounds gives the base's fill value, and nothing else.

    Terms are filled with zeros where they are looked up, and gains are as well.
    """
    fill_value = equation.params["fill_value"]
    if fill_value is None or np.isnan(fill_value):  # not a number, whatever is added to it
        return True
    is_filled = equation.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    indexed = equation.params["dimension_numbers"].start_index_map
    every_index_looks_up = "none" not in holding and set(indexed) == set(looked_up)
    gain_keeps = value.gain is None or bool(np.equal(fill_value, 0))
    return gain_keeps and (every_index_looks_up or not is_filled)


def _looked_up_axes(equation: Equation, shape: tuple[Size, ...]) -> list[int]:
    """Returns the axes of which only a part is picked."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    return [int(axis) for axis in numbers.start_index_map if sizes[axis] != shape[axis]]


def _row_axis(equation: Equation, looked_up: Sequence[int]) -> int | None:
    """Returns the axis along which single places are looked up; None of any other lookup."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    is_plain = len(looked_up) == 1 and tuple(numbers.start_index_map) == tuple(looked_up)
    return looked_up[0] if is_plain and sizes[looked_up[0]] == 1 else None


def _is_of_rows(term: Term, axis: int | None) -> bool:
    """Says whether a term changes single places of an axis, and is in one factor."""
    windows = dict(enumerate(term.window))
    is_rows = axis is not None and isinstance(windows.pop(axis), Rows)
    return is_rows and not any(windows.values()) and term.lora_A.size == 1


def _holding(term: Term, axes: Sequence[int]) -> str | None:
    """Returns how many factors hold the axes: "one", "both" or "none"; None if it differs."""
    if not axes:
        return "none"
    if any(term.window):
        return "one"
    holds = [[factor.shape[axis] != 1 for axis in axes] for factor in (term.lora_A, term.lora_B)]
    if any(any(held) != all(held) for held in holds):
        return None
    return ("none", "one", "both")[sum(bool(held) and all(held) for held in holds)]


def _picked(
    equation: Equation, factor: Array, indices: Array, looked_up: Sequence[int], base: Any
) -> Array:
    """Returns the part of a factor that belongs to the picked part of the weight, aligned."""
    numbers = equation.params["dimension_numbers"]
    sizes = [
        1 if whole == 1 else size
        for size, whole in zip(equation.params["slice_sizes"], factor.shape[:-1], strict=True)
    ]
    if not all(factor.shape[axis] != 1 for axis in looked_up):
        # An axis without an index is cut from its start.
        kept = factor[tuple(map(slice, sizes))]
        return _aligned_with_offsets(kept, numbers, base.ndim)
    return jax.lax.gather(
        factor,
        indices,
        numbers._replace(offset_dims=(*numbers.offset_dims, base.ndim)),
        (*sizes, factor.shape[-1]),
        unique_indices=equation.params["unique_indices"],
        indices_are_sorted=equation.params["indices_are_sorted"],
        mode=equation.params["mode"],
        # Where an index is out of bounds, the base's own fill value stands alone.
        fill_value=0,
    )


def _picked_rows(
    equation: Equation, term: Term, indices: Array, base: Any, shape: tuple[Size, ...]
) -> Term:
    """Returns the part of a term of single rows that belongs to the rows that are looked up.

    A table of one number for each row of the weight says which row of lora_B is added to it.
    """
    numbers = equation.params["dimension_numbers"]
    (axis,) = numbers.start_index_map
    rows = term.window[axis]
    assert isinstance(rows, Rows)
    count = rows.width
    table = jnp.full(shape[axis], count, jnp.int32)
    table = table.at[rows.places].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
    of_lookups = jax.lax.gather(
        table,
        indices,
        numbers._replace(offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,)),
        (1,),
        mode=equation.params["mode"],
        fill_value=count,
    )
    held = jax.lax.gather(
        term.lora_B,
        of_lookups[..., None],
        numbers._replace(offset_dims=(*numbers.offset_dims, base.ndim)),
        (*(1 if a == axis else n for a, n in enumerate(term.lora_B.shape[:-1])), 1),
        mode="fill",
        fill_value=0,
    )
    one = _aligned_with_offsets(term.lora_A, numbers, base.ndim)
    return term.moved(one, held, (None,) * base.ndim)


def _aligned_with_offsets(factor: Array, numbers: Any, ndim: int) -> Array:
    """Returns a factor without looked-up axes, its other axes placed as in the result."""
    kept = [axis for axis in range(factor.ndim - 1) if axis not in numbers.collapsed_slice_dims]
    sizes = [1] * ndim
    for place, axis in zip(numbers.offset_dims, kept, strict=True):
        sizes[place] = factor.shape[axis]
    return factor.reshape(*sizes, factor.shape[-1])


def _rows_dropped_out(
    interpreter: Interpreter, equation: Equation, term: Term, use: int, shape: tuple[Size, ...]
) -> Term:
    """Returns the term with some lookups dropped: a lookup is a product with a one-hot input.

    A mask has an element for each lookup, and meets the factor that was looked up in.
    """
    in_rows = equation.params["dimension_numbers"].offset_dims
    lookups = [1 if axis in in_rows else size for axis, size in enumerate(shape)]
    ones = jnp.ones((*lookups, 1), term.lora_A.dtype)
    mask = interpreter.dropout.dropped_out(ones, use)
    if mask is ones:
        return term
    if any(
        size_A == 1 and lookup != 1
        for size_A, lookup in zip(term.lora_A.shape, lookups, strict=False)
    ):
        masked = term.moved(term.lora_A, term.lora_B * mask.astype(term.lora_B.dtype))
    else:
        masked = term.moved(term.lora_A * mask, term.lora_B)
    return dataclasses.replace(masked, scale=interpreter.dropout.scaled(term.scale))


def rules() -> dict[Primitive, Rule]:
    """Returns the rule of lookups."""
    return {primitives.gather_p: Rule(factors=gather, roles=roles)}
