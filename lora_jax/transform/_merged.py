"""Products with W + AB whose gradients are those of the factors."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._shapes import AnyArray
from lora_jax.transform._dense import dense_value
from lora_jax.transform._factored import Factored
from lora_jax.transform._terms import Term


def merged_product(
    multiply: Callable[[Any, Array], Array],
    change: Callable[[Any, Sequence[Term], Array], Array],
    x: AnyArray,
    value: Factored,
) -> Array:
    r"""Returns the product of x and W' = W + Σ terms, differentiated as the factored product is.

    With $y = x W'$ and $W' = W + s A B$,

    $$\dot y = \dot x W' + s\,(x \dot A) B + s\,(x A) \dot B,$$

    so that a step makes W' once in each direction, which takes few operations where x has many
    rows, and neither adds (x A) B to y nor makes the gradient of W'. The tangent is linear, and
    JAX transposes it. Only x and the arrays of `value` are kept for the backward pass.

    Args:
      multiply: multiplies what stands for x with an array in place of the weight.
      change: returns what terms add to a product with x; the product tells shape and dtype.
      x: the other operand.
      value: the weight, without a gain.
    """

    @jax.custom_jvp
    def apply(x: Array, value: Factored) -> Array:
        return multiply(x, dense_value(value))

    @functools.partial(apply.defjvp, symbolic_zeros=True)
    def tangent(primals: Any, tangents: Any) -> tuple[Array, Array]:
        x, value = primals
        along_x, along_value = tangents
        y = apply(x, value)
        parts = [] if _is_zero(along_x) else [multiply(along_x, dense_value(_apart(value)))]
        if any(not _is_zero(leaf) for leaf in jax.tree.leaves(along_value.terms)):
            parts.append(
                _pushed_forward(lambda terms: change(x, terms, y), value.terms, along_value.terms)
            )
        return y, sum(parts[1:], start=parts[0]) if parts else jnp.zeros_like(y)

    return jax.checkpoint(apply, prevent_cse=False)(x, value)


def _apart(value: Factored) -> Factored:
    """Returns a value that XLA does not take for the same.

    It would build W' once for both directions, and keep it in between.
    """
    return dataclasses.replace(value, terms=jax.lax.optimization_barrier(value.terms))


def _pushed_forward(function: Callable[[Any], Array], point: Any, tangent: Any) -> Array:
    """Returns the derivative of a function of a tree along a tangent that may be zero in places."""
    leaves, structure = jax.tree.flatten(point)
    along = jax.tree.leaves(tangent)
    moving = [place for place, leaf in enumerate(along) if not _is_zero(leaf)]

    def of_moving(*values: Array) -> Array:
        by_place = dict(zip(moving, values, strict=True))
        return function(
            jax.tree.unflatten(structure, [by_place.get(i, leaf) for i, leaf in enumerate(leaves)])
        )

    values, directions = [leaves[i] for i in moving], [along[i] for i in moving]
    return jax.jvp(of_moving, values, directions)[1]


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
