"""The methods in plain NumPy and float64, and weights of every kind of axes to try them on."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from lora_jax.updates import lora_fa, lora_plus, riemannian

RANK = 3
RATIO = 16.0
FA_DAMPING = 1e-8
RIEMANNIAN_DAMPING = 1e-2
RATE, DECAY = 1e-2, 0.1

AXES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "dense": ((6, 5), ("in", "out")),
    "transposed": ((5, 6), ("out", "in")),
    "query": ((6, 2, 4), ("in", "out", "out")),
    "output": ((2, 4, 6), ("in", "in", "out")),
    "convolution": ((2, 2, 4, 5), ("in", "in", "in", "out")),
    "layers": ((4, 6, 5), ("batch", "in", "out")),
    "layers of heads": ((3, 6, 2, 4), ("batch", "in", "out", "out")),
    "experts in between": ((6, 4, 5), ("in", "batch", "out")),
    "two batch axes": ((2, 3, 6, 5), ("batch", "batch", "in", "out")),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method: as a transformation around another, and what it does to the two gradients.

    Without one of the labels that it `moves` it has nothing to do.
    """

    around: Callable[[Any], Any]
    before: Callable[..., tuple[Any, Any]] = lambda A, B, scale, gradient_A, gradient_B: (
        gradient_A,
        gradient_B,
    )
    rates: tuple[float, float] = (1.0, 1.0)
    moves: tuple[str, ...] = ("lora_A", "lora_B")


def projected(A: Any, B: Any, scale: float, gradient_A: Any, gradient_B: Any) -> tuple[Any, Any]:
    gram = A.mT @ A + FA_DAMPING * np.eye(RANK)
    return 0 * gradient_A, np.linalg.inv(gram) @ gradient_B / scale**2


def riemannian_gradients(
    A: Any, B: Any, scale: float, gradient_A: Any, gradient_B: Any
) -> tuple[Any, Any]:
    damping = RIEMANNIAN_DAMPING * np.eye(RANK)
    return (
        gradient_A @ np.linalg.inv(B @ B.mT + damping),
        np.linalg.inv(A.mT @ A + damping) @ gradient_B,
    )


VARIANTS = {
    "lora_plus": Variant(
        lambda tx: optax.chain(tx, lora_plus(RATIO)), rates=(1.0, RATIO), moves=("lora_B",)
    ),
    "lora_fa": Variant(lora_fa, projected, rates=(0.0, 1.0), moves=("lora_B",)),
    "riemannian": Variant(lambda tx: optax.chain(riemannian(), tx), riemannian_gradients),
}


@functools.cache
def wrapped_params(names: Sequence[str] = tuple(AXES), dtype: Any = jnp.float64) -> Any:
    """Returns a tree with a weight for each of `names`, one trained in full and one frozen."""
    params = {name: {"kernel": jnp.ones(AXES[name][0])} for name in names}
    wrapped = lora_jax.wrap(
        {**params, "head": {"bias": jnp.ones(5), "mean": jnp.ones(5)}},
        "kernel",
        rank=RANK,
        alpha=2 * RANK,
        axes={f"{name}/kernel": AXES[name][1] for name in names},
        train="bias",
        dtype=dtype,
    )
    adapters, frozen = lora_jax.split(wrapped)
    return lora_jax.combine(random_like(adapters, seed=1), frozen)


def random_like(tree: Any, seed: int) -> Any:
    """Returns a tree with normally distributed leaves."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), tree)


def gradients_like(wrapped: Any, seed: int) -> Any:
    """Returns a gradient as `adapt` gives it: zero for all that is frozen."""
    adapters, frozen = lora_jax.split(wrapped)
    return lora_jax.combine(random_like(adapters, seed), jax.tree.map(jnp.zeros_like, frozen))


def matrices(node: Any) -> tuple[Any, Any]:
    """Returns the factors as stacks of matrices, (*batch, in, r) and (*batch, r, out)."""
    batch = node.axes.count("batch")
    A, B = np.asarray(node.lora_A, np.float64), np.asarray(node.lora_B, np.float64)
    return A.reshape(*A.shape[:batch], -1, RANK), B.reshape(*B.shape[:batch], RANK, -1)


class Sgd:
    def __call__(self, values: Any, gradients: Any) -> Any:
        return [-RATE * gradient for gradient in gradients]


class Adamw:
    """AdamW with optax's defaults."""

    def __init__(self, rate: Callable[[int], float] = lambda step: RATE) -> None:
        self.rate, self.step, self.moments = rate, 0, [(0.0, 0.0), (0.0, 0.0)]

    def __call__(self, values: Any, gradients: Any) -> Any:
        self.moments = [
            (0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2)
            for (first, second), gradient in zip(self.moments, gradients, strict=True)
        ]
        rate, self.step = self.rate(self.step), self.step + 1
        return [
            -rate
            * (
                first / (1 - 0.9**self.step) / (np.sqrt(second / (1 - 0.999**self.step)) + 1e-8)
                + DECAY * value
            )
            for value, (first, second) in zip(values, self.moments, strict=True)
        ]


def expected_matrices(variant: Variant, tx: Any, node: Any, gradients: Sequence[Any]) -> Any:
    """Returns both factors of one weight after a step along each of `gradients`."""
    A, B = matrices(node)
    scale = float(node.scale)
    for gradient in gradients:
        update_A, update_B = tx((A, B), variant.before(A, B, scale, *matrices(gradient)))
        A, B = A + variant.rates[0] * update_A, B + variant.rates[1] * update_B
    return A, B
