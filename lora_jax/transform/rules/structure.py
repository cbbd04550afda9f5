"""Rules for ops that only move, cut or scale a weight: applied to the base and to the factors.

A factor has size 1 on the axes that it doesn't depend on. So a rule does to a factor what the op
does to the base on the other axes, and leaves the axes of size 1 and the rank alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

from lora_jax._compat import (
    SHARD_AXIS,
    Equation,
    Primitive,
    emitted_primitive,
    primitive_in_shards,
    primitives,
)
from lora_jax.transform._bases import moved_bases
from lora_jax.transform._interpreter import Interpreter
from lora_jax.transform._terms import Windows
from lora_jax.transform.rules._moves import moved, with_base
from lora_jax.transform.rules._rule import Rule


def on_every_array(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with an elementwise op that keeps sums applied to base and factors.

    `stop_gradient`, copies: f(W + AB) = f(W) + f(A) f(B).
    """
    (value,) = inputs
    return [
        moved(equation, value, lambda factor: equation.primitive.bind(factor, **equation.params))
    ]


def on_base_alone(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with an op that changes no number, such as `name`, applied to its base."""
    (value,) = inputs
    return [dataclasses.replace(value, base=moved_bases(equation, inputs)[0])]


def optimization_barrier(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> list[Any]:
    """Returns the inputs, factors included, behind one barrier."""
    return list(jax.lax.optimization_barrier(tuple(inputs)))


def convert_element_type(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> list[Any] | None:
    """Returns the weight in another floating-point dtype: base and factors are converted."""
    (value,) = inputs
    dtype = equation.params["new_dtype"]
    # In 8 bits or fewer the sum of rounded factors would differ from the rounded sum.
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize < 2:
        return None
    converted = moved(equation, value, lambda factor: factor.astype(dtype))
    # A gain near 1 would lose in bfloat16 what it has learned; it is cast with the result.
    return [dataclasses.replace(converted, gain=value.gain)]


def converted_base_alone(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> list[Any] | None:
    """Returns the weight in another dtype, its probes in float32: they hold sums."""
    if not jnp.issubdtype(equation.params["new_dtype"], jnp.floating):
        return None
    return on_base_alone(interpreter, equation, inputs)


def transpose(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with its axes in another order."""
    (value,) = inputs
    order = equation.params["permutation"]
    return [
        moved(
            equation,
            value,
            lambda factor: factor.transpose(*order, len(order)),
            lambda windows: tuple(windows[axis] for axis in order),
        )
    ]


def squeeze(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight without some axes of size 1."""
    (value,) = inputs
    removed = equation.params["dimensions"]
    kept = [axis for axis in range(value.ndim) if axis not in removed]
    value = value.without_windows(removed)
    return [
        moved(
            equation,
            value,
            lambda factor: factor.squeeze(removed),
            lambda windows: tuple(windows[axis] for axis in kept),
        )
    ]


def broadcast_in_dim(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with new axes, on which neither factor depends.

    An axis of size 1 that grows is such an axis too, so a term has no window there.
    """
    value = inputs[0]
    shape = equation.params["shape"]
    ndim = len(shape)
    kept = equation.params["broadcast_dimensions"]
    grown = [i for i, axis in enumerate(kept) if value.shape[i] != shape[axis]]
    value = value.without_windows(grown)

    def factor_with_axes(factor: Array) -> Array:
        return jnp.expand_dims(factor, [axis for axis in range(ndim) if axis not in kept])

    def windows_with_axes(windows: Windows) -> Windows:
        by_axis = dict(zip(kept, windows, strict=True))
        return tuple(by_axis.get(axis) for axis in range(ndim))

    base = moved_bases(equation, inputs)[0]
    return [with_base(value, base, factor_with_axes, windows_with_axes)]


def rev(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight with some axes reversed."""
    (value,) = inputs
    reversed_axes = equation.params["dimensions"]

    def mirrored(windows: Windows) -> Windows:
        return tuple(
            window.mirrored(value.shape[axis])
            if window is not None and axis in reversed_axes
            else window
            for axis, window in enumerate(windows)
        )

    return [moved(equation, value, lambda factor: jax.lax.rev(factor, reversed_axes), mirrored)]


def tile(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> list[Any]:
    """Returns the weight repeated along its axes; factors repeat on the axes that they hold."""
    (value,) = inputs
    reps = equation.params["reps"]
    value = value.without_windows([axis for axis, rep in enumerate(reps) if rep != 1])

    def repeated(factor: Array) -> Array:
        held = zip(reps, factor.shape, strict=False)
        return jnp.tile(factor, (*(rep if size != 1 else 1 for rep, size in held), 1))

    return [moved(equation, value, repeated)]


def rules() -> dict[Primitive, Rule]:
    """Returns the rules of ops that keep a weight whole."""
    return {
        emitted_primitive(
            lambda x: with_layout_constraint(x, Layout((0,))), jax.ShapeDtypeStruct((1,), "float32")
        ): Rule(factors=on_base_alone),
        jax.lax.optimization_barrier_p: Rule(factors=optimization_barrier),
        jax.lax.tile_p: Rule(factors=tile),
        primitive_in_shards(
            lambda x: jax.lax.pcast(x, SHARD_AXIS, to="varying"), check_vma=True, is_cut=False
        ): Rule(factors=on_base_alone),
        primitives.broadcast_in_dim_p: Rule(factors=broadcast_in_dim),
        primitives.convert_element_type_p: Rule(
            factors=convert_element_type, rows=converted_base_alone
        ),
        primitives.copy_p: Rule(factors=on_every_array),
        primitives.name_p: Rule(factors=on_base_alone),
        primitives.rev_p: Rule(factors=rev),
        primitives.squeeze_p: Rule(factors=squeeze),
        primitives.stop_gradient_p: Rule(factors=on_every_array),
        primitives.transpose_p: Rule(factors=transpose),
    }
