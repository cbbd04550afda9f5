"""Quantised arrays of other libraries, declared to be weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._serialization import introduce_to_flax
from lora_jax._shapes import Size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForeignWeight:
    """A quantised array of another library, as a weight that `wrap` and `adapt` take.

    `quantization.declare` makes these.

    Attributes:
      array: the other library's array, a pytree with a `shape`.
      function: the function that turns it into an array.
      dtype_name: the name of the dtype that the weight dequantises to.
    """

    array: Any
    function: Callable[[Any], Array] = dataclasses.field(metadata={"static": True})
    dtype_name: str = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        introduce_to_flax(type(self))

    @property
    def shape(self) -> tuple[Size, ...]:
        """The shape of the weight."""
        return tuple(self.array.shape)

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype that the weight dequantises to."""
        return jnp.dtype(self.dtype_name)

    @property
    def batch_ndim(self) -> int:
        """The number of leading axes that every leaf of the array has.

        A cut of all leaves along one of them is the array of that cut: elsewhere several weights
        share a scale.
        """
        shape = self.shape
        shapes = [leaf.shape for leaf in jax.tree.leaves(self.array)]
        ends = range(1, len(shape) + 1)
        held = [all(each[:end] == shape[:end] for each in shapes) for end in ends]
        return [*held, False].index(False)

    def dequantize(self) -> Array:
        """Returns the weight as an array of its `dtype`."""
        return self.function(self.array).astype(self.dtype)


def declare(
    params: Any, node_type: type, *, dequantize: Callable[[Any], Array], dtype: Any = None
) -> Any:
    """Returns params in which the quantised arrays of another library are weights.

    Such an array is a pytree: its codes and scales are leaves of `params`, and look like weights of
    their own. Declared, it is one weight, whose codes stay as they are.

    Args:
      params: the parameter tree.
      node_type: the type of the arrays; a pytree node with a `shape`, whose leaves are cut together
        along each leading axis that they all have.
      dequantize: the library's function from such an array to a JAX array.
      dtype: the dtype of the weights; by default that of what `dequantize` returns.

    Returns:
      The tree with a `ForeignWeight` in place of each array of this type.

    Raises:
      ValueError: `params` holds none of these.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> from typing import NamedTuple
      >>> class Scaled(NamedTuple):
      ...     codes: jax.Array
      ...     scale: jax.Array
      ...     shape = property(lambda self: self.codes.shape)
      >>> params = {"kernel": Scaled(jnp.ones((4, 3), jnp.int8), jnp.full((1, 3), 0.5))}
      >>> declared = lora_jax.quantization.declare(
      ...     params, Scaled, dequantize=lambda array: array.codes.astype(jnp.float32) * array.scale
      ... )
      >>> wrapped = lora_jax.wrap(declared, "kernel", rank=2)
      >>> lora_jax.adapt(lambda params, x: x @ params["kernel"])(wrapped, jnp.ones((1, 4))).tolist()
      [[2.0, 2.0, 2.0]]
    """

    def is_foreign(leaf: Any) -> bool:
        return isinstance(leaf, node_type)

    if not any(map(is_foreign, jax.tree.leaves(params, is_leaf=is_foreign))):
        raise ValueError(
            f"`params` holds no {node_type.__name__}; expected the type of its quantised arrays."
        )

    def declared(leaf: Any) -> Any:
        if not is_foreign(leaf):
            return leaf
        found = jax.eval_shape(dequantize, leaf).dtype if dtype is None else jnp.dtype(dtype)
        return ForeignWeight(leaf, dequantize, str(found))

    return jax.tree.map(declared, params, is_leaf=is_foreign)
