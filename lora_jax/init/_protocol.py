"""What an initialiser is."""

import dataclasses
from typing import Protocol

import jax
from jaxtyping import Array, Float, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """A factor that an initialiser made and that is not to train."""

    array: Array


class Initializer(Protocol):
    """A function that makes the frozen base and the two factors of one weight.

    It sees every weight as a matrix: several input axes are flattened into one, several output axes
    likewise, and batch axes are mapped over. Returning `weight2d` itself as the base says that the
    base does not change, and then nothing is copied.

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
        weight2d: Float[Array, "in out"],
        rank: int,
        scale: float,
        /,
    ) -> tuple[Float[Array, "in out"], Float[Array, "in r"], Float[Array, "r out"]]: ...
