"""The rule for `ragged_dot_general`: each group of rows times the factors of its expert."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import Equation, Primitive, emitted_primitive
from lora_jax._dtypes import common_dtype
from lora_jax._shapes import Size
from lora_jax.transform._bases import computed_with_bases
from lora_jax.transform._dense import dense_flops
from lora_jax.transform._factored import Factored, multiplied
from lora_jax.transform._interpreter import Interpreter, scope_of
from lora_jax.transform._report import Use
from lora_jax.transform._roles import contraction_roles, note_roles
from lora_jax.transform._rows import recorded
from lora_jax.transform._terms import Term, without_windows
from lora_jax.transform.rules._contraction import product_dtype
from lora_jax.transform.rules._rule import Rule


def ragged_dot_general(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> Sequence[Any] | None:
    """Returns each group of rows times the weight of its expert, through that expert's factors."""
    x, weight, group_sizes = inputs[0], inputs[1], jnp.asarray(inputs[2])
    numbers = equation.params["ragged_dot_dimension_numbers"]
    is_plain = (
        numbers.dot_dimension_numbers == (((1,), (1,)), ((), ()))
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )
    if not is_plain or isinstance(x, Factored) or equation.params["group_offset"] is not None:
        return None
    terms = [without_windows(term, weight.shape) for term in weight.terms]
    factors = [pair for pair in map(_expert_factors, terms) if pair is not None]
    # Gains of the form (experts, 1, out), one for each expert's output features.
    if len(factors) < len(terms) or 1 in weight.held_by_gain:
        return None
    result = computed_with_bases(equation, [x, weight, group_sizes])[0]
    for path, part in weight.parts().items():
        flops = sum(2 * x.shape[0] * term.rank * sum(weight.shape[1:]) for term in part.terms)
        interpreter.reporter.tell(
            Use(
                path=path,
                primitive=equation.primitive.name,
                source=interpreter.reporter.source_of(equation),
                how="factored",
                base_flops=2 * x.size * weight.shape[2],
                factored_flops=flops,
                dense_flops=dense_flops(part),
            )
        )
    with scope_of(equation), jax.named_scope("lora"):
        for use, (term, (kernel, mixer)) in enumerate(zip(terms, factors, strict=True)):
            adapter_input = interpreter.dropout.dropped_out(x, use)
            scale = interpreter.dropout.scaled(term.scale)
            result += _expert_change(
                equation, adapter_input, kernel, mixer, scale, group_sizes, result
            )
        if weight.gain is not None:
            gain = _gain_of_rows(weight.gain.aligned.squeeze(-1), group_sizes, x.shape[0])
            result = multiplied(result, gain).astype(result.dtype)
    return [result]


def roles(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any] | None:
    """Records the axes of a stack of experts: the experts are a batch axis."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    x, weight, _ = inputs
    if isinstance(x, Factored):
        return None
    own = contraction_roles(
        weight.ndim, contracted=contracted, batch=(*batch, *numbers.rhs_group_dimensions)
    )
    note_roles(interpreter, equation, weight, own)
    return computed_with_bases(equation, inputs)


def rows(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the products with the bases, the rows of each expert recorded."""
    x, weight, group_sizes = inputs
    result = computed_with_bases(equation, inputs)[0]
    if isinstance(x, Factored):
        return [result]
    for term in weight.terms:
        probe = without_windows(term, weight.shape)
        experts = group_sizes.shape[0]
        kernels = jnp.broadcast_to(
            probe.lora_A.squeeze(2), (experts, *weight.shape[1:2], probe.rank)
        )
        counters = jnp.broadcast_to(
            jnp.max(probe.lora_B, axis=(1, 2)).reshape(-1, 1, 1), (experts, 1, 1)
        )
        hidden = jax.lax.ragged_dot(x.astype(jnp.float32), kernels, group_sizes)
        counts = jax.lax.ragged_dot(jnp.ones((x.shape[0], 1)), counters, group_sizes)
        result = recorded(result, hidden, counts.squeeze(-1))
    return [result]


def _gain_of_rows(gain: Array, group_sizes: Array, rows: Size) -> Array:
    """Returns the gain of the expert that each row goes to, of shape (rows, out)."""
    experts = jnp.broadcast_to(gain, (group_sizes.shape[0], *gain.shape[1:]))
    return jax.lax.ragged_dot(
        jnp.ones((rows, 1), gain.dtype), experts, group_sizes, precision=jax.lax.Precision.HIGHEST
    )


def _expert_factors(term: Term) -> tuple[Array, Array] | None:
    """Returns the factors of shapes (experts, in, 1, r) and (experts, 1, out, r), or None."""
    for kernel, mixer in ((term.lora_A, term.lora_B), (term.lora_B, term.lora_A)):
        if kernel.shape[2] == 1 and mixer.shape[1] == 1:
            return kernel, mixer
    return None


def _expert_change(
    equation: Equation,
    x: Array,
    kernel: Array,
    mixer: Array,
    scale: Array,
    group_sizes: Array,
    result: Array,
) -> Array:
    dtype = common_dtype(x.dtype, kernel.dtype, mixer.dtype)
    experts = group_sizes.shape[0]

    def of_each_expert(factor: Array, axis: int, size: Size) -> Array:
        """Returns a factor as (experts, size, r), whether it depends on these axes or not."""
        kernels = factor.squeeze(axis)
        return jnp.broadcast_to(kernels, (experts, size, kernels.shape[-1])).astype(dtype)

    def ragged_dot(x: Array, weight: Array) -> Array:
        return jax.lax.ragged_dot(
            x,
            weight,
            group_sizes,
            precision=equation.params["precision"],
            preferred_element_type=product_dtype(equation, dtype),
        )

    hidden = ragged_dot(x.astype(dtype), of_each_expert(kernel, 2, x.shape[1]))
    hidden = hidden * scale.astype(hidden.dtype)
    mixers = of_each_expert(mixer, 1, result.shape[1]).swapaxes(1, 2)
    return ragged_dot(hidden.astype(dtype), mixers).astype(result.dtype)


def rules() -> dict[Primitive, Rule]:
    """Returns the rule of `ragged_dot_general`."""
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1, 1), "float32"), ((1, 1, 1), "float32"), ((1,), "int32"))
    ]
    return {
        emitted_primitive(jax.lax.ragged_dot, *shapes): Rule(
            factors=ragged_dot_general, roles=roles, rows=rows
        )
    }
