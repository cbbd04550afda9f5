"""What an initialiser is."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from lora_jax.quantization._encode import Encoding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """A factor that does not train: an initialiser wraps lora_A or lora_B in it.

    Attributes:
      array: the factor.

    Examples:
      >>> import jax.numpy as jnp
      >>> def identity_on_the_outputs(key, weight2d, rank, scale):
      ...     inputs, outputs = weight2d.shape
      ...     return weight2d, jnp.zeros((inputs, rank)), Frozen(jnp.eye(rank, outputs))
    """

    array: Float[Array, "..."] | Any


@dataclasses.dataclass(frozen=True)
class QuantizedBase:
    """A base that `wrap` quantises: an initialiser returns it in place of a base.

    It is the rounded weight2d - scale * lora_A @ lora_B of the factors here.

    Attributes:
      encoding: how it is quantised.
      lora_A: A, of shape (in, r); None for a base that is the rounded weight.
      lora_B: B, of shape (r, out), or None.
    """

    encoding: Encoding
    lora_A: Float[Array, "in r"] | None = None
    lora_B: Float[Array, "r out"] | None = None


@runtime_checkable
class Initializer(Protocol):
    """A function that makes the frozen base and the two factors of one weight.

    It sees every weight as a matrix: several input axes are flattened into one, several output axes
    likewise, and batch axes are mapped over. It is traced; `rank` and `scale` are plain numbers.

    Returning `weight2d` itself as the base means that the base does not change, and nothing is
    copied. Any other base means that the factors start as a part of the weight, and must be
    `weight2d - scale * lora_A @ lora_B`: `wrap` computes it from the weight and the factors in the
    dtype in which they are stored, so that `restore` can recompute the same base bit for bit. It
    raises if the returned base differs from that.

    A factor inside a `Frozen` does not train.

    Args:
      key: a key of its own for this weight.
      weight2d: the weight as a matrix.
      rank: r.
      scale: s; the model computes with base + s · lora_A · lora_B.

    Returns:
      base, of the shape and dtype of `weight2d`; lora_A; lora_B.
    """

    def __call__(
        self,
        key: PRNGKeyArray,
        weight2d: Shaped[Array, "in out"],
        rank: int,
        scale: float,
        /,
    ) -> tuple[
        Shaped[Array, "in out"] | QuantizedBase,
        Float[Array, "in r"] | Frozen,
        Float[Array, "r out"] | Frozen,
    ]: ...
