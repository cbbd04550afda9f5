"""When W + AB is built: where that is cheaper, and where no rule avoids it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax._compat import Equation
from lora_jax._shapes import Size
from lora_jax.transform._dense import built, dense_flops, dense_value, is_as_exact_dense
from lora_jax.transform._factored import Factored
from lora_jax.transform._report import Reporter, Use


def prefers_dense(base_flops: Size, factored_flops: Size, building_flops: Size) -> bool:
    """Says whether a training step is cheaper with W + AB built than with factors.

    Let F be the FLOPs of the base op x W, f the FLOPs that the factored products add to it, and b
    the FLOPs of building W + AB. With y = x W + x A B and the cotangent ȳ of y, a step takes

        factored:  f forward; the cotangents of x A B in each of its operands, which for every
                   product are two products of the same size: 2 f
        built:     b forward; W̄ = xᵀ ȳ, a product as large as the base op: F; and of it
                   Ā = W̄ Bᵀ and B̄ = Aᵀ W̄, two products of the size of A B: 2 b

    beside the base op and its cotangent ȳ Wᵀ, which both have. So W + AB is built if
    F + 3 b < 3 f. Counting the forward pass alone, b < f, would build W in every large batch and
    then pay for W̄.

    With a symbolic shape the counts are polynomials. Where neither is smaller for every value of
    its symbols, the weight stays factored.

    Args:
      base_flops: F.
      factored_flops: f.
      building_flops: b.
    """
    try:
        return bool(base_flops + 3 * building_flops < 3 * factored_flops)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def chosen(
    reporter: Reporter,
    equation: Equation,
    value: Factored,
    base_flops: Size,
    term_flops: Sequence[Size],
    *,
    may_build: bool,
) -> Any:
    """Returns a weight as an op should use it: without terms if that is cheaper, else unchanged.

    Building a half-precision weight would round away the factors' extra precision, so it stays
    factored.

    Args:
      reporter: records the choice.
      equation: the op.
      value: the weight.
      base_flops: operations of the op alone.
      term_flops: operations of the products of each term.
      may_build: whether building is allowed; dropout acts on the adapter's input, so a built weight
        could not have it.
    """
    is_dense = (
        may_build
        and is_as_exact_dense(value)
        and prefers_dense(base_flops, sum(term_flops), dense_flops(value))
    )
    source = reporter.source_of(equation)
    for path, part in value.parts().items():
        reporter.tell(
            Use(
                path=path,
                primitive=equation.primitive.name,
                source=source,
                how="dense" if is_dense else "factored",
                base_flops=base_flops,
                factored_flops=sum(
                    flops
                    for term, flops in zip(value.terms, term_flops, strict=True)
                    if str(term.origin) == path
                ),
                dense_flops=dense_flops(part),
            )
        )
    return built(value) if is_dense else value


def materialized(reporter: Reporter, equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Returns the values as arrays: base + Σ terms is built where `equation` needs an array."""
    where = equation.primitive.name, reporter.source_of(equation)
    return [
        materialized_value(reporter, value, *where) if isinstance(value, Factored) else value
        for value in values
    ]


def materialized_inputs(reporter: Reporter, equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Returns the same for an equation that `computed_with_bases` evaluates: without terms."""
    where = equation.primitive.name, reporter.source_of(equation)
    return [
        _told(reporter, value, *where, built) if isinstance(value, Factored) else value
        for value in values
    ]


def materialized_value(
    reporter: Reporter, value: Factored, primitive: str, source: str
) -> jax.Array:
    """Returns base + Σ terms, which `primitive` at `source` needs."""
    return _told(reporter, value, primitive, source, dense_value)


def _told(
    reporter: Reporter,
    value: Factored,
    primitive: str,
    source: str,
    build: Callable[[Factored], Any],
) -> Any:
    for path, part in value.parts().items():
        reporter.tell(Use(path, primitive, source, "materialized", 0, None, dense_flops(part)))
    return build(value)
