"""How a model uses its weights: plainly, or with LoRA written into each use by hand.

Both do the same mathematics around the same model code, so that the programs of the adapted and the
hand-written model differ by nothing but who wrote the LoRA in.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

import lora_jax


class Operations(Protocol):
    """Every way in which the models use a weight."""

    def project(self, x: Array, weight: Any, axes: int = 1) -> Array:
        """Returns the last `axes` axes of `x` summed over with the first ones of the weight."""

    def project_back(self, x: Array, weight: Any) -> Array:
        """Returns `x` times the weight transposed, as a tied head does."""

    def look_up(self, weight: Any, indices: Array) -> Array:
        """Returns the rows of the weight at `indices`."""

    def convolve(self, x: Array, weight: Any) -> Array:
        """Returns the convolution of `x` (NHWC) with the weight (HWIO), of the same size."""


class Plain:
    """The model as its author wrote it, without LoRA."""

    def project(self, x: Array, weight: Array, axes: int = 1) -> Array:
        """Returns a product; see `Operations`."""
        return jnp.tensordot(x, weight, axes)

    def project_back(self, x: Array, weight: Array) -> Array:
        """Returns a product with the transposed weight; see `Operations`."""
        return x @ weight.T

    def look_up(self, weight: Array, indices: Array) -> Array:
        """Returns rows; see `Operations`."""
        return weight[indices]

    def convolve(self, x: Array, weight: Array) -> Array:
        """Returns a convolution; see `Operations`."""
        return jax.lax.conv_general_dilated(
            x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


PLAIN = Plain()


class Factors(NamedTuple):
    """A weight and its factors, as a model that has LoRA written into it would hold them."""

    W: Array
    A: Array
    B: Array


@dataclasses.dataclass(frozen=True)
class WrittenByHand:
    """The same uses with LoRA written in: `x @ W + scale * (x @ A) @ B`."""

    scale: float

    def project(self, x: Array, weight: Array | Factors, axes: int = 1) -> Array:
        """Returns a product; see `Operations`."""
        if not isinstance(weight, Factors):
            return PLAIN.project(x, weight, axes)
        W, A, B = weight
        change = jnp.tensordot(self.scale * jnp.tensordot(x, A, axes), B, 1)
        product = PLAIN.project(x, W, axes)
        return product + change.astype(product.dtype)

    def project_back(self, x: Array, weight: Array | Factors) -> Array:
        """Returns a product with the transposed weight; see `Operations`."""
        if not isinstance(weight, Factors):
            return PLAIN.project_back(x, weight)
        W, A, B = weight
        return x @ W.T + self.scale * (x @ B.T) @ A.T

    def look_up(self, weight: Array | Factors, indices: Array) -> Array:
        """Returns rows; see `Operations`."""
        if not isinstance(weight, Factors):
            return PLAIN.look_up(weight, indices)
        W, A, B = weight
        return W[indices] + self.scale * A[indices] @ B

    def convolve(self, x: Array, weight: Array | Factors) -> Array:
        """Returns a convolution; see `Operations`."""
        if not isinstance(weight, Factors):
            return PLAIN.convolve(x, weight)
        W, A, B = weight
        return PLAIN.convolve(x, W) + self.scale * PLAIN.convolve(x, A) @ B


def with_factors(wrapped: Any) -> Any:
    """Returns a wrapped tree with the plain arrays of `Factors` in place of each `LoRAWeight`."""

    def factors(node: Any) -> Any:
        if isinstance(node, lora_jax.LoRAWeight):
            return Factors(node.base, node.lora_A, node.lora_B)
        return node

    return jax.tree.map(factors, wrapped, is_leaf=lambda x: isinstance(x, lora_jax.LoRAWeight))
