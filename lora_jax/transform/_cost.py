"""The choice between factored products and building W + AB, by count of operations."""

import jax

from lora_jax._shapes import Size


def prefers_dense(base_flops: Size, factored_flops: Size, building_flops: Size) -> bool:
    """Says whether a training step is cheaper with W + AB built than with factors.

    The backward pass of each factored product is two products of the same size. That of a built
    weight is the gradient of W, as large as the base op, and two products to split it in A's and
    B's. Counting the forward pass alone would build W in every large batch and then pay for dW.

    With a symbolic shape the counts are polynomials. Where neither is smaller for every value of
    its symbols, the weight stays factored.
    """
    try:
        return bool(building_flops + base_flops + 2 * building_flops < 3 * factored_flops)
    except jax.errors.InconclusiveDimensionOperation:
        return False
