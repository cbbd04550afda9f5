"""Linear algebra that several initialisers share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lora_jax._dtypes import common_dtype

Decomposition = tuple[Float[Array, "in k"], Float[Array, " k"], Float[Array, "k out"]]


def widened(array: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Returns `array` in the dtype to compute in: its own, and at least float32."""
    return array.astype(common_dtype(array.dtype, jnp.float32))


def product(
    left: Float[Array, "rows inner"], right: Float[Array, "inner columns"]
) -> Float[Array, "rows columns"]:
    """Returns the matrix product in full precision, even if the hardware rounds operands."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def residual(
    weight2d: Shaped[Array, "in out"],
    scale: float,
    lora_A: Float[Array, "in r"],
    lora_B: Float[Array, "r out"],
) -> Shaped[Array, "in out"]:
    """Returns W - s · A · B in the dtype of W."""
    return (widened(weight2d) - scale * product(lora_A, lora_B)).astype(weight2d.dtype)


def singular_value_decomposition(matrix: Shaped[Array, "in out"]) -> Decomposition:
    """Returns U, the singular values in descending order, and V transposed; k = min(in, out)."""
    U, S, Vt = jnp.linalg.svd(matrix, full_matrices=False)
    return U, S, Vt


def with_fixed_signs(columns: Float[Array, "rows k"]) -> Float[Array, "rows k"]:
    """Returns the columns, with signs that make the entry of the largest magnitude positive.

    A decomposition leaves the signs open, and they may differ between machines.
    """
    largest = jnp.take_along_axis(columns, jnp.argmax(abs(columns), axis=0)[None], axis=0)
    return jnp.where(largest < 0, -columns, columns)


def leading_singular_vectors(
    key: PRNGKeyArray,
    matrix: Shaped[Array, "in out"],
    count: int,
    *,
    power_iterations: int | None,
    oversampling: int,
) -> Decomposition:
    r"""Returns the `count` largest singular values and their vectors.

    Without `power_iterations` they are exact. With them, an orthonormal $Q$ of `count +
    oversampling` columns that spans nearly what the leading left vectors span is found from a
    random $\Omega$ as the range of $(W W^\top)^q W \Omega$, and then the small matrix
    $Q^\top W = \tilde U \Sigma V^\top$ is decomposed: $U = Q \tilde U$. Each factor $W$ or
    $W^\top$ shrinks what lies outside by the ratio of the singular values, at a cost of
    O(in · out · count). Between the factors the columns are made orthonormal again, since their
    small parts would otherwise be lost to rounding.

    Args:
      key: a random key; not used without `power_iterations`.
      matrix: the matrix.
      count: how many.
      power_iterations: q, or None for the exact decomposition.
      oversampling: how many columns beyond `count` to iterate.

    Raises:
      ValueError: `power_iterations` or `oversampling` is negative.

    Source: Halko, Martinsson and Tropp, Finding Structure with Randomness: Probabilistic Algorithms
    for Constructing Approximate Matrix Decompositions, 2011, algorithms 4.4 and 5.1.
    """
    if power_iterations is None:
        U, S, Vt = singular_value_decomposition(matrix)
        return U[:, :count], S[:count], Vt[:count]
    for name, value in (("power_iterations", power_iterations), ("oversampling", oversampling)):
        if value < 0:
            raise ValueError(f"`{name}` is {value}; expected a whole number of at least 0.")
    inputs, outputs = matrix.shape
    columns = min(count + oversampling, inputs, outputs)
    Q = _orthonormal(product(matrix, jax.random.normal(key, (outputs, columns), matrix.dtype)))
    Q = jax.lax.fori_loop(
        0,
        power_iterations,
        lambda _, Q: _orthonormal(product(matrix, _orthonormal(product(matrix.T, Q)))),
        Q,
    )
    U, S, Vt = singular_value_decomposition(product(Q.T, matrix))
    return product(Q, U[:, :count]), S[:count], Vt[:count]


def _orthonormal(columns: Float[Array, "rows k"]) -> Float[Array, "rows k"]:
    Q, _ = jnp.linalg.qr(columns)
    return Q
