"""The gradients of attention's products are those of the formulas, and read scores in order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.score_products import mixed, scores_of
from tests.agreement import assert_agree

BATCH, SHARED, ROWS, KEYS, DIM = 2, 3, 24, 16, 8
FORMULAS = {
    scores_of: ("brd,bsd->brs", (ROWS, DIM), (KEYS, DIM)),
    mixed: ("brs,bsd->brd", (ROWS, KEYS), (KEYS, DIM)),
}


def drawn(*shape):
    return np.random.default_rng(sum(shape)).normal(size=(BATCH, SHARED, *shape))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("product", FORMULAS, ids=["scores_of", "mixed"])
def test_values_and_gradients_are_those_of_the_formula(product, dtype):
    formula, *shapes = FORMULAS[product]
    operands = [jnp.asarray(drawn(*shape), dtype) for shape in shapes]
    result, gradients_of = jax.vjp(product, *operands)
    cotangent = jnp.asarray(drawn(*result.shape[2:]), result.dtype)
    found = [result, *gradients_of(cotangent)]

    first, second = (np.asarray(each, np.float64).reshape(6, *each.shape[2:]) for each in operands)
    read, written = formula.split("->")
    one, other = read.split(",")
    of_result = np.asarray(cotangent, np.float64).reshape(6, *cotangent.shape[2:])
    expected = [
        np.einsum(formula, first, second),
        np.einsum(f"{written},{other}->{one}", of_result, second),
        np.einsum(f"{one},{written}->{other}", first, of_result),
    ]
    for each, exact in zip(found, expected, strict=True):
        if dtype == jnp.float32:
            assert_agree(each, exact.reshape(each.shape))
        else:
            np.testing.assert_allclose(
                np.asarray(each, np.float64), exact.reshape(each.shape), rtol=2e-2, atol=4e-2
            )
    assert [each.dtype for each in gradients_of(cotangent)] == [dtype, dtype]


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="it is for CPUs that scores are in order"
)
@pytest.mark.parametrize("product", FORMULAS, ids=["scores_of", "mixed"])
def test_no_product_reads_across_its_left_operand(product):
    formula, *shapes = FORMULAS[product]
    operands = [jnp.zeros((BATCH, SHARED, *shape)) for shape in shapes]

    def program(product):
        def gradients(*operands):
            result, gradients_of = jax.vjp(product, *operands)
            return gradients_of(result)

        return jax.jit(gradients).lower(*operands).compile().as_text()

    across = "lhs_contracting_dims={2}"
    batched = jax.vmap(functools.partial(jnp.einsum, formula))
    assert across in program(batched)
    assert across not in program(product)
