"""When W + AB is built: where that is cheaper, and where no rule avoids it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax._compat import Equation
from lora_jax._shapes import Size
from lora_jax.transform._dense import built, dense_flops, dense_value, is_as_exact_dense
from lora_jax.transform._factored import Factored
from lora_jax.transform._report import How, Reporter, Use


def cheapest(
    ways: Sequence[How], base_flops: Size, factored_flops: Size, building_flops: Size
) -> How:
    """Returns in which of some ways an op takes the fewest FLOPs in a training step.

    Let F be the FLOPs of the base op x W, f the FLOPs that the factored products add to it, and b
    the FLOPs of building W' = W + A B. With y = x W + x A B and the cotangent ȳ of y, a step takes

        factored:  f forward; the cotangents of x A B in each of its operands, which for every
                   product are two products of the same size: 2 f
        merged:    b forward and b again backward, as W' is not kept; of the factored products
                   those that give Ā and B̄: x A, ȳ Bᵀ, xᵀ (ȳ Bᵀ) and (x A)ᵀ ȳ, 2 f
        dense:     b forward; W̄ = xᵀ ȳ, a product as large as the base op: F; and of it
                   Ā = W̄ Bᵀ and B̄ = Aᵀ W̄, two products of the size of A B: 2 b

    beside the base op and its cotangent, ȳ Wᵀ or ȳ W'ᵀ, which all have. Counting the forward pass
    alone, b < f, would build W' in every large batch and then pay for W̄.

    With a symbolic shape the counts are polynomials. Where none is smallest for every value of its
    symbols, the weight stays factored.

    Args:
      ways: the ways to choose from; the first one of those that cost the same is chosen.
      base_flops: F.
      factored_flops: f.
      building_flops: b.
    """
    costs: dict[How, Size] = {
        "factored": 3 * factored_flops,
        "merged": 2 * factored_flops + 2 * building_flops,
        "dense": base_flops + 3 * building_flops,
    }
    try:
        return min(ways, key=lambda how: costs[how])
    except jax.errors.InconclusiveDimensionOperation:
        return ways[0]


def chosen(
    reporter: Reporter,
    equation: Equation,
    value: Factored,
    base_flops: Size,
    term_flops: Sequence[Size],
    *,
    may_build: bool,
    may_merge: bool = True,
) -> How:
    """Returns how an op should use a weight: `"factored"`, `"merged"` or `"dense"`.

    Building a half-precision weight would round away the factors' extra precision, so it stays
    factored. So does a weight of which single rows change: the built one would be a copy of it, for
    the sake of a few rows.

    Args:
      reporter: records the choice.
      equation: the op.
      value: the weight.
      base_flops: operations of the op alone.
      term_flops: operations of the products of each term.
      may_build: whether building is allowed; dropout acts on the adapter's input, so a built weight
        could not have it.
      may_merge: whether `merged_product` covers the op.
    """
    ways: list[How] = ["factored"]
    if may_build and is_as_exact_dense(value) and not value.has_rows:
        ways += ["merged", "dense"] if may_merge else ["dense"]
    how = cheapest(ways, base_flops, sum(term_flops), dense_flops(value))
    source = reporter.source_of(equation)
    for path, part in value.parts().items():
        reporter.tell(
            Use(
                path=path,
                primitive=equation.primitive.name,
                source=source,
                how=how,
                base_flops=base_flops,
                factored_flops=sum(
                    flops
                    for term, flops in zip(value.terms, term_flops, strict=True)
                    if str(term.origin) == path
                ),
                dense_flops=dense_flops(part),
            )
        )
    return how


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
