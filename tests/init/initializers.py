"""Every initialiser, made for a weight and its axes, and what it gives as matrices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax._shapes import to_matrices
from tests.arrays import random

KEY = jax.random.key(3)
# More inputs than outputs, and fewer; then axes in another order, and several for each role.
SHAPES = [
    ((12, 10), ("in", "out")),
    ((10, 12), ("in", "out")),
    ((10, 3, 12), ("out", "batch", "in")),
    ((2, 6, 3, 2, 5, 2), ("batch", "in", "batch", "in", "out", "out")),
]


def wrapped_kernel(shape: tuple[int, ...], **options: Any) -> lora_jax.LoRAWeight:
    params = {"kernel": random(*shape)}
    return lora_jax.wrap(params, "kernel", key=KEY, **options)["kernel"]


def gathered_moments(rows: Any) -> lora_jax.init.InputMoments:
    """Returns the moments of `rows`, of shape (batch, n, in)."""
    rows = np.asarray(rows, np.float64)
    return lora_jax.init.InputMoments(
        second=jnp.asarray(np.einsum("bni,bnj->bij", rows, rows), jnp.float32),
        first=jnp.asarray(rows.sum(1), jnp.float32),
        count=jnp.full(rows.shape[0], rows.shape[1]),
    )


def seen_inputs(matrices: Any, count: int = 50) -> np.ndarray:
    """Returns inputs (batch, n, in) with a mean, and a variance of its own along each axis."""
    batch, inputs, _ = matrices.shape
    generator = np.random.default_rng(5)
    deviations = np.linspace(2, 0.1, inputs)
    return 0.5 + generator.normal(size=(batch, count, inputs)) * deviations


def a_gradient(leaf: Any) -> jax.Array:
    return random(*leaf.shape, dtype=leaf.dtype, seed=11)


def from_moments(make: Callable[..., Any], **options: Any) -> Callable[[Any, Any], Any]:
    return lambda leaf, axes: make(
        {"kernel": gathered_moments(seen_inputs(to_matrices(leaf, axes)))}, **options
    )


def from_gradient(**options: Any) -> Callable[[Any, Any], Any]:
    return lambda leaf, axes: lora_jax.init.lora_ga({"kernel": a_gradient(leaf)}, **options)


# Every initialiser, made for a weight and its axes.
INITIALIZERS: dict[str, Callable[[Any, Any], Any]] = {
    "corda ipm": from_moments(lora_jax.init.corda),
    "corda kpm": from_moments(lora_jax.init.corda, mode="kpm"),
    "eva": from_moments(lora_jax.init.eva),
    "eva whitened": from_moments(lora_jax.init.eva, whiten=True),
    "gaussian": lambda leaf, axes: "gaussian",
    "kaiming": lambda leaf, axes: "kaiming",
    "lora_ga": from_gradient(),
    "lora_ga A2rBr": from_gradient(direction="A2rBr", gamma=None),
    "lora_ga ArBr randomised": from_gradient(direction="ArBr", power_iterations=4),
    "mica": lambda leaf, axes: "mica",
    "olora": lambda leaf, axes: "olora",
    "orthogonal": lambda leaf, axes: "orthogonal",
    "pissa": lambda leaf, axes: "pissa",
    "pissa randomised": lambda leaf, axes: functools.partial(
        lora_jax.init.pissa, power_iterations=2
    ),
}
KEEPS_THE_BASE = {"eva", "eva whitened", "gaussian", "kaiming", "mica", "orthogonal"}


def initialised(
    name: str, leaf: jax.Array, axes: tuple[str, ...], rank: int = 3, alpha: float = 1.5
) -> lora_jax.LoRAWeight:
    init = INITIALIZERS[name](leaf, axes)
    return lora_jax.wrap(
        {"kernel": leaf},
        "kernel",
        rank=rank,
        alpha=alpha,
        key=KEY,
        axes={"kernel": axes},
        init=init,
    )["kernel"]


def as_matrices(
    weight: lora_jax.LoRAWeight,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns base (batch, in, out), lora_A (batch, in, r) and lora_B (batch, r, out)."""
    base = np.asarray(to_matrices(weight.base, weight.axes))
    batch, inputs, outputs = base.shape
    return (
        base,
        np.asarray(weight.lora_A).reshape(batch, inputs, weight.rank),
        np.asarray(weight.lora_B).reshape(batch, weight.rank, outputs),
    )
