"""The rule for `dot_general`: the base op plus products of the other operand and the factors."""

import dataclasses
import itertools
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
from lora_jax.transform._terms import Term, plus_block, spread_block, without_windows
from lora_jax.transform.rules._contraction import Contraction
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
    contraction = Contraction.of(interpreter, equation, inputs)
    inputs, gains = _with_gains_outside(contraction, inputs)
    plans = [contraction.plans(position, inputs) for position in range(len(inputs))]
    hows = [_how(contraction, position, inputs, plans) for position in range(len(inputs))]
    operands = [
        built(value) if how == "dense" else value for value, how in zip(inputs, hows, strict=True)
    ]
    multiply = _merged if "merged" in hows else _multiplied_out
    result = multiply(contraction, operands, plans)
    with scope_of(equation), jax.named_scope("lora"):
        for gain in gains:
            result = multiplied(result, gain).astype(result.dtype)
    return [result]


def _how(
    contraction: Contraction,
    position: int,
    inputs: Sequence[Any],
    plans: Sequence[Sequence[Plan]],
) -> How:
    """Returns how to compute with an operand; an array has no terms."""
    value, other, interpreter = inputs[position], inputs[1 - position], contraction.interpreter
    if not isinstance(value, Factored):
        return "factored"
    return chosen(
        interpreter.reporter,
        contraction.equation,
        value,
        contraction.flops(inputs),
        [plan.flops for plan in plans[position]],
        may_build=not interpreter.dropout.is_active,
        # XLA for a GPU joins products of one input, and keeps what it joined with x A; for a TPU,
        # steps of few layers take a tenth more memory. So weights are merged on a CPU alone.
        may_merge=interpreter.may_merge and not isinstance(other, Factored) and is_for_cpu(other),
    )


def _multiplied_out(
    contraction: Contraction, operands: Sequence[Any], plans: Sequence[Sequence[Plan]]
) -> Array:
    """Returns the product of the bases, plus one of three or four arrays for each summand."""
    equation = contraction.equation
    result = computed_with_bases(equation, operands)[0]
    parts: list[Any] = [
        # A weight that was built has no terms left.
        [None, *zip(terms_of(operand), of_terms, strict=False)]
        for operand, of_terms in zip(operands, plans, strict=True)
    ]
    with scope_of(equation), jax.named_scope("lora"):
        for use, summand in enumerate(itertools.product(*parts)):
            if any(part is not None for part in summand):
                block = rematerialized(*_block_of(contraction, use, operands, summand, result))
                terms = [part and part[0] for part in summand]
                result = plus_block(result, block, contraction.windows(terms))
    return result


def _block_of(
    contraction: Contraction,
    use: int,
    operands: Sequence[Any],
    summand: Sequence[tuple[Term, Plan] | None],
    result: Array,
) -> tuple[Any, ...]:
    """Returns `block` as a function of the operands that stand for themselves, and those."""
    places = [place for place, part in enumerate(summand) if part is None]

    def block(*own: Any) -> Array:
        by_place = dict(zip(places, own, strict=True))
        mixed = [by_place.get(place, operand) for place, operand in enumerate(operands)]
        return contraction.block(use, mixed, summand, result)

    return block, *(operands[place] for place in places)


def _merged(
    contraction: Contraction, operands: Sequence[Any], plans: Sequence[Sequence[Plan]]
) -> Array:
    """Returns the product of an array with base + Σ terms, and the gradients of the factors."""
    equation = contraction.equation
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
                spread_block(
                    contraction.block(use, mixed, in_order(None, (term, plan)), result),
                    contraction.windows(in_order(None, term)),
                    result.shape,
                )
                for use, (term, plan) in enumerate(zip(terms, plans[position], strict=True))
            ]
            return sum(changes[1:], start=changes[0])

    return merged_product(multiply, change, operands[1 - position], operands[position])


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
    contraction = Contraction.of(interpreter, equation, inputs)
    labels, output = contraction.labels, contraction.output
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
    contraction: Contraction, inputs: Sequence[Any]
) -> tuple[list[Any], list[Array]]:
    r"""Returns the operands without gains, and the factor to multiply the product by instead.

    A gain g on axes that the product keeps moves to the result: $x (W \circ g) = (x W) \circ g$. On
    axes that it sums over, g moves to the other operand: $(W \circ g) x = W (g \circ x)$. If it is
    on axes of both kinds, or if the other operand is a weight too, the weight is built.
    """
    equation, labels = contraction.equation, contraction.labels
    operands = list(inputs)
    gains: list[Array] = []
    for position, value in enumerate(inputs):
        if not isinstance(value, Factored) or value.gain is None:
            continue
        kept = {axis for axis, label in enumerate(labels[position]) if label in contraction.output}
        other = operands[1 - position]
        without_gain = dataclasses.replace(value, gain=None)
        gain = value.gain.aligned.squeeze(-1)
        if value.held_by_gain <= kept:
            operands[position] = without_gain
            gains.append(_in_axes_of(contraction.output, gain, labels[position]))
        elif not value.held_by_gain & kept and not isinstance(other, Factored):
            with scope_of(equation), jax.named_scope("lora"):
                scaled = multiplied(
                    other, _in_axes_of(labels[1 - position], gain, labels[position])
                )
                operands[1 - position] = scaled.astype(other.dtype)
            operands[position] = without_gain
        else:
            reporter = contraction.interpreter.reporter
            operands[position] = materialized_inputs(reporter, equation, [value])[0]
    return operands, gains


def _in_axes_of(target: Labels, array: Array, labels: Labels) -> Array:
    """Returns an array that is the same everywhere but on axes of `target`, with those axes."""
    held = without_unit_axes(array, labels)
    order = [label for label in target if label in held.labels]
    in_order = held.array.transpose([held.labels.index(label) for label in order])
    return jnp.expand_dims(
        in_order, [axis for axis, label in enumerate(target) if label not in order]
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
    rank_label = 1 + max((*x_labels, *labels), default=0)
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
