"""Low-rank adaptation with gradient approximation."""

import functools
from typing import Any, Literal, get_args

from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lora_jax._paths import leaves_with_paths
from lora_jax.init._data import DataInitializer
from lora_jax.init._linear_algebra import (
    leading_singular_vectors,
    residual,
    widened,
    with_fixed_signs,
)

Direction = Literal["ArB2r", "A2rBr", "ArBr"]


def lora_ga(
    gradients: Any,
    *,
    direction: Direction = "ArB2r",
    gamma: float | None = 16.0,
    power_iterations: int | None = None,
) -> DataInitializer:
    r"""Returns an initialiser whose first training steps follow the full gradient.

    With the gradient of the loss with respect to a weight, $G = U \Sigma V^\top$,

    $$ A = \zeta\, U_{1 \dots r}, \qquad B = \zeta\, V_{r+1 \dots 2r}^\top, \qquad
       W_0 = W - s A B, \qquad \zeta = \sqrt[4]{out} / \sqrt\gamma. $$

    A step of gradient descent at rate $\eta$ changes $A$ by $-\eta s\, G B^\top$ and $B$ by
    $-\eta s\, A^\top G$, hence the weight by

    $$ -\eta s^2 (G B^\top B + A A^\top G) = -\eta s^2 \zeta^2\, U_{2r} \Sigma_{2r} V_{2r}^\top $$

    to first order: a multiple of the best approximation of $G$ that factors of rank r can reach,
    which is of rank 2r. $\zeta$ keeps the size of the output's change independent of the weight's
    shape. The model's outputs are unchanged, to rounding. The signs of the vectors cancel in the
    step, but not in $A B$, which pairs vectors of different singular values; the entry of the
    largest magnitude is positive in each.

    This is the paper and its authors' code. PEFT multiplies the factor B by the gradient's singular
    values and leaves $\zeta$ out of A, so that there the start depends on the scale of the loss.

    Args:
      gradients: a tree like `params` with the gradient at each weight to adapt, averaged over a few
        batches; it may leave out the others.
      direction: which singular vectors go where. `"ArB2r"`: the first r to A, the next r to B.
        `"A2rBr"`: the other way around. `"ArBr"`: the odd ones to B and the even ones to A.
      gamma: $\gamma$; None for $\zeta = 1$.
      power_iterations: the number of power iterations of a randomised decomposition; by default
        the decomposition is exact. See `pissa`.

    Returns:
      What `init=` of `wrap` takes; base (in, out), lora_A (in, r), lora_B (r, out). It raises where
      2r is above the weight's smaller side.

    Raises:
      ValueError: `direction` is none of these, or `gamma` is not positive.

    Source: Wang, Yu and Li, LoRA-GA: Low-Rank Adaptation with Gradient Approximation, 2024.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.eye(4)}
      >>> loss = lambda params, x: jnp.sum((x @ params["kernel"]) ** 2)
      >>> gradients = jax.grad(loss)(params, jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0])))
      >>> init = lora_jax.init.lora_ga(gradients, gamma=None)
      >>> weight = lora_jax.wrap(params, "kernel", rank=1, init=init)["kernel"]
      >>> abs(weight.lora_A[:, 0]).tolist(), abs(weight.lora_B[0]).tolist()
      ([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])
    """
    if direction not in get_args(Direction):
        raise ValueError(f"`direction` is {direction!r}; expected one of {get_args(Direction)}.")
    if gamma is not None and not gamma > 0:
        raise ValueError(f"`gamma` is {gamma}; expected a positive number, or None for no scaling.")
    function = functools.partial(
        _gradient_directions,
        direction=direction,
        gamma=gamma,
        power_iterations=power_iterations,
    )
    return DataInitializer(function, dict(leaves_with_paths(gradients)), shaped_as_weights=True)


def _gradient_directions(
    key: PRNGKeyArray,
    weight2d: Shaped[Array, "in out"],
    rank: int,
    scale: float,
    gradient: Shaped[Array, "in out"],
    *,
    direction: Direction,
    gamma: float | None,
    power_iterations: int | None,
) -> tuple[Shaped[Array, "in out"], Float[Array, "in r"], Float[Array, "r out"]]:
    smaller_side = min(weight2d.shape)
    if 2 * rank > smaller_side:
        raise ValueError(
            f"`rank` is {rank} for a weight that is {weight2d.shape} as a matrix (in, out); "
            f"lora_ga takes 2 · rank singular vectors, so that at most {smaller_side // 2} fits. A "
            "mapping in `targets` gives a weight a rank of its own."
        )
    dtype = widened(weight2d).dtype
    # As in the authors' code.
    U, _, Vt = leading_singular_vectors(
        key,
        gradient.astype(dtype),
        2 * rank,
        power_iterations=power_iterations,
        oversampling=2 * rank,
    )
    of_A, of_B = _places(direction, rank)
    size = 1.0 if gamma is None else weight2d.shape[1] ** 0.25 / gamma**0.5
    lora_A = size * with_fixed_signs(U[:, of_A])
    lora_B = size * with_fixed_signs(Vt[of_B].T).T
    return residual(weight2d, scale, lora_A, lora_B), lora_A, lora_B


def _places(direction: Direction, rank: int) -> tuple[slice, slice]:
    """Returns which of the 2r singular vectors lora_A gets, and which lora_B."""
    first, second = slice(0, rank), slice(rank, 2 * rank)
    if direction == "ArBr":
        return slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)
    return (first, second) if direction == "ArB2r" else (second, first)
