"""The rule for `dot_general`: the base op plus products of the other operand and the factors."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import Equation, Primitive, evaluate_equation, primitives, settings_of
from lora_jax.transform._bases import computed_with_bases, rematerialized
from lora_jax.transform._building import chosen, materialized_inputs
from lora_jax.transform._dense import built
from lora_jax.transform._factored import Factored, multiplied, terms_of
from lora_jax.transform._interpreter import Interpreter, scope_of
from lora_jax.transform._merged import merged_product
from lora_jax.transform._product import (
    Labels,
    Plan,
    is_for_cpu,
    product,
    without_unit_axes,
)
from lora_jax.transform._report import How
from lora_jax.transform._roles import contraction_roles, note_roles
from lora_jax.transform._rows import recorded
from lora_jax.transform._terms import Term, without_windows
from lora_jax.transform.rules._contraction import (
    change_by,
    changing,
    labels_of,
    plans_of,
    rank_label_of,
    sizes_of,
)
from lora_jax.transform.rules._rule import Rule


def dot_general(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> Sequence[Any] | None:
    r"""Returns $x \cdot W$ plus, for each term, the product of x, lora_A and lora_B.

    A contraction is linear in each operand, so with $W = W_0 + \sum_k s_k A_k B_k$ it is the base
    contraction plus one of three operands for each term, which is taken in the cheapest order. If
    both operands are factored, the sum is multiplied out. Where x has many rows, W is built, and
    the gradients are still those of the factors.
    """
    labels, output = labels_of(equation, inputs)
    inputs, gains = _with_gains_outside(interpreter, equation, inputs, labels, output)
    plans = [plans_of(position, inputs, labels, output) for position in range(len(inputs))]
    hows = [
        _how(interpreter, equation, position, inputs, labels, plans[position])
        for position in range(len(inputs))
    ]
    operands = [
        built(value) if how == "dense" else value for value, how in zip(inputs, hows, strict=True)
    ]
    multiply = _merged if "merged" in hows else _multiplied_out
    result = multiply(interpreter, equation, operands, plans, labels, output)
    with scope_of(equation), jax.named_scope("lora"):
        for gain in gains:
            result = multiplied(result, gain).astype(result.dtype)
    return [result]


def _multiplied_out(
    interpreter: Interpreter,
    equation: Equation,
    operands: Sequence[Any],
    plans: Sequence[Sequence[Plan]],
    labels: Sequence[Labels],
    output: Labels,
) -> Array:
    """Returns the product of the bases, plus one of three or four arrays for each summand."""
    result = computed_with_bases(equation, operands)[0]
    parts: list[Any] = [
        # A weight that was built has no terms left.
        [None, *zip(terms_of(operand), of_terms, strict=False)]
        for operand, of_terms in zip(operands, plans, strict=True)
    ]
    with scope_of(equation), jax.named_scope("lora"):
        for use, summand in enumerate(itertools.product(*parts)):
            if any(part is not None for part in summand):
                changed = changing(
                    interpreter, equation, use, operands, summand, labels, output, result
                )
                result += rematerialized(*changed)
    return result


def _merged(
    interpreter: Interpreter,
    equation: Equation,
    operands: Sequence[Any],
    plans: Sequence[Sequence[Plan]],
    labels: Sequence[Labels],
    output: Labels,
) -> Array:
    """Returns the product of an array with base + Σ terms, and the gradients of the factors."""
    (position,) = (place for place, each in enumerate(operands) if isinstance(each, Factored))

    def in_order(x: Any, weight: Any) -> list[Any]:
        return [weight, x] if position == 0 else [x, weight]

    def multiply(x: Any, weight: Array) -> Array:
        with settings_of(equation):
            return evaluate_equation(equation, in_order(x, weight))[0]

    def change(x: Any, terms: Sequence[Term], result: Array) -> Array:
        mixed = in_order(x, operands[position])
        with settings_of(equation), scope_of(equation), jax.named_scope("lora"):
            changes = [
                change_by(
                    interpreter, equation, use, mixed, in_order(None, part), labels, output, result
                )
                for use, part in enumerate(zip(terms, plans[position], strict=True))
            ]
            return sum(changes[1:], start=changes[0])

    return merged_product(multiply, change, operands[1 - position], operands[position])


def _may_merge(interpreter: Interpreter, x: Any) -> bool:
    """Says whether the weight that multiplies x may be built in each direction.

    XLA for a GPU joins products of one input, and keeps what it joined with x A; for a TPU, steps
    of few layers take a tenth more memory. Until that is solved, weights are merged on a CPU.
    """
    return interpreter.may_merge and not isinstance(x, Factored) and is_for_cpu(x)


def roles(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Records which axes are contracted (inputs), mapped over (batch) and kept (outputs)."""
    contracted, batch = equation.params["dimension_numbers"]
    for position, value in enumerate(inputs):
        if isinstance(value, Factored):
            own = contraction_roles(
                value.ndim, contracted=contracted[position], batch=batch[position]
            )
            note_roles(interpreter, equation, value, own)
    return computed_with_bases(equation, inputs)


def rows(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the product with the base, the rows of the other operand recorded."""
    labels, output = labels_of(equation, inputs)
    result = computed_with_bases(equation, inputs)[0]
    for position, value in enumerate(inputs):
        other = inputs[1 - position]
        if isinstance(value, Factored) and not isinstance(other, Factored):
            for term in value.terms:
                result = _with_rows(
                    result,
                    other,
                    labels[1 - position],
                    without_windows(term, value.shape),
                    labels[position],
                    output,
                )
    return [result]


def _with_gains_outside(
    interpreter: Interpreter,
    equation: Equation,
    inputs: Sequence[Any],
    labels: Sequence[Labels],
    output: Labels,
) -> tuple[list[Any], list[Array]]:
    r"""Returns the operands without gains, and the factor to multiply the product by instead.

    A gain g on axes that the product keeps moves to the result: $x (W \circ g) = (x W) \circ g$. On
    axes that it sums over, g moves to the other operand: $(W \circ g) x = W (g \circ x)$. If it is
    on axes of both kinds, or if the other operand is a weight too, the weight is built.
    """
    operands = list(inputs)
    gains: list[Array] = []
    for position, value in enumerate(inputs):
        if not isinstance(value, Factored) or value.gain is None:
            continue
        kept = {axis for axis, label in enumerate(labels[position]) if label in output}
        other = operands[1 - position]
        without_gain = dataclasses.replace(value, gain=None)
        gain = value.gain.aligned.squeeze(-1)
        if value.held_by_gain <= kept:
            operands[position] = without_gain
            gains.append(_in_axes_of(output, gain, labels[position]))
        elif not value.held_by_gain & kept and not isinstance(other, Factored):
            with scope_of(equation), jax.named_scope("lora"):
                scaled = multiplied(
                    other, _in_axes_of(labels[1 - position], gain, labels[position])
                )
                operands[1 - position] = scaled.astype(other.dtype)
            operands[position] = without_gain
        else:
            operands[position] = materialized_inputs(interpreter.reporter, equation, [value])[0]
    return operands, gains


def _in_axes_of(target: Labels, array: Array, labels: Labels) -> Array:
    """Returns an array that is the same everywhere but on axes of `target`, with those axes."""
    held = without_unit_axes(array, labels)
    order = [label for label in target if label in held.labels]
    in_order = held.array.transpose([held.labels.index(label) for label in order])
    return jnp.expand_dims(
        in_order, [axis for axis, label in enumerate(target) if label not in order]
    )


def _how(
    interpreter: Interpreter,
    equation: Equation,
    position: int,
    inputs: Sequence[Any],
    labels: Sequence[Labels],
    plans: Sequence[Plan],
) -> How:
    """Returns how to compute with an operand; an array has no terms."""
    value = inputs[position]
    if not isinstance(value, Factored):
        return "factored"
    return chosen(
        interpreter.reporter,
        equation,
        value,
        2 * math.prod(sizes_of(inputs, labels).values()),
        [plan.flops for plan in plans],
        may_build=not interpreter.dropout.is_active,
        may_merge=_may_merge(interpreter, inputs[1 - position]),
    )


def _with_rows(
    result: Array, x: Array, x_labels: Labels, probe: Term, labels: Labels, output: Labels
) -> Array:
    """Returns `result`, the rows of x recorded if the op sums over the weight's input axes."""
    held = {label for label, size in zip(labels, probe.lora_A.shape, strict=False) if size != 1}
    summed = {label for label in x_labels if label in labels and label not in output}
    if held - set(output) != {
        label
        for label, size in zip(x_labels, x.shape, strict=True)
        if label in summed and size != 1
    }:
        return result
    rank_label = rank_label_of(0, (x_labels, labels))
    x = x.astype(jnp.float32)
    operands = [
        without_unit_axes(array, named)
        for array, named in ((x, x_labels), (probe.lora_A, (*labels, rank_label)))
    ]
    hidden = product(operands, (*output, rank_label), precision=jax.lax.Precision.HIGHEST)
    counter = without_unit_axes(probe.lora_B, (*labels, rank_label))
    # Along the weight's outputs any index will do: a row is multiplied by all of them.
    outputs = [axis for axis, name in enumerate(counter.labels) if name not in hidden.labels]
    held_labels = [name for name in counter.labels if name in hidden.labels]
    order = [name for name in hidden.labels[:-1] if name in held_labels]
    rows = jnp.max(counter.array, axis=tuple(outputs)).transpose(
        [held_labels.index(name) for name in order]
    )
    absent = [axis for axis, name in enumerate(hidden.labels[:-1]) if name not in order]
    rows = jnp.broadcast_to(jnp.expand_dims(rows, absent), hidden.array.shape[:-1])
    return recorded(result, hidden.array, rows)


def rules() -> dict[Primitive, Rule]:
    """Returns the rule of `dot_general`."""
    return {primitives.dot_general_p: Rule(factors=dot_general, roles=roles, rows=rows)}
