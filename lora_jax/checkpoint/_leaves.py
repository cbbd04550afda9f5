"""The leaves of a training state: as Orbax stores them, and back as what they were."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax._folders import CheckpointError
from lora_jax.checkpoint._placement import placed, sharding_of

LeavesWithPaths = Sequence[tuple[str, Any]]

_NUMBERS = (bool, int, float)


@dataclasses.dataclass(frozen=True)
class LeafMetadata:
    """What a leaf must be when it is read again.

    Attributes:
      path: its path, beginning with the argument that it is of.
      container: what holds its numbers.
      shape: its shape; for random keys that of their data.
      dtype: its dtype, or the type of a Python number; for random keys that of their data.
      weak_type: whether JAX treats it as a Python number where dtypes meet.
      implementation: that of random keys, where there are any.
      number: a Python number itself, which needs no array.
    """

    path: str
    container: Literal["jax", "numpy", "key", "number"]
    shape: tuple[int, ...]
    dtype: str
    weak_type: bool = False
    implementation: str | None = None
    number: bool | int | float | None = None

    @classmethod
    def of(cls, path: str, leaf: Any) -> "LeafMetadata":
        if isinstance(leaf, _NUMBERS) and not isinstance(leaf, np.generic):
            return cls(path, "number", (), type(leaf).__name__, number=leaf)
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise CheckpointError(
                f"'{path}' is a {type(leaf).__name__}; expected arrays, random keys and numbers."
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.eval_shape(jax.random.key_data, leaf)
            known = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else None
            return cls(path, "key", data.shape, str(data.dtype), implementation=known)
        shape, dtype = tuple(leaf.shape), str(leaf.dtype)
        if isinstance(leaf, np.ndarray | np.generic):
            return cls(path, "numpy", shape, dtype)
        return cls(path, "jax", shape, dtype, weak_type=bool(leaf.weak_type))

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "LeafMetadata":
        return cls(**{**entry, "shape": tuple(entry["shape"])})

    @property
    def has_numbers(self) -> bool:
        """Whether there is an array to store: Orbax takes none without elements."""
        return self.container != "number" and 0 not in self.shape

    def fits(self, target: "LeafMetadata") -> bool:
        """Says whether this leaf may stand where `target` is now.

        Compiled functions make arrays of Python numbers, so that both may stand for the other.
        """
        if self.path != target.path or self.shape != target.shape:
            return False
        if "number" in (self.container, target.container):
            return "key" not in (self.container, target.container)
        if (self.container == "key") != (target.container == "key"):
            return False
        known = {self.implementation, target.implementation} - {None}
        return self.dtype == target.dtype and len(known) < 2

    def described(self) -> str:
        """Returns the leaf in words."""
        return f"'{self.path}' of shape {self.shape} and dtype {self.dtype}"


def arrays_to_save(leaves: LeavesWithPaths) -> dict[str, Any]:
    """Returns what Orbax is to store: by its number, each leaf that has an array of numbers."""
    return {
        str(number): jax.random.key_data(leaf) if metadata.container == "key" else _array(leaf)
        for number, (path, leaf) in enumerate(leaves)
        if (metadata := LeafMetadata.of(path, leaf)).has_numbers
    }


def arrays_to_restore(metadata: Sequence[LeafMetadata], targets: Sequence[Any]) -> dict[str, Any]:
    """Returns what Orbax is to read: onto the shardings of the targets, or into NumPy arrays."""
    return {
        str(number): _abstract_array(leaf, sharding_of(target))
        for number, (leaf, target) in enumerate(zip(metadata, targets, strict=True))
        if leaf.has_numbers
    }


def restored_leaf(leaf: LeafMetadata, stored: Any, target: Any) -> Any:
    """Returns a leaf as it was saved, with the sharding of `target`."""
    if leaf.container == "number":
        return leaf.number
    if stored is None:
        stored = np.zeros(leaf.shape, jnp.dtype(leaf.dtype))
    if leaf.container == "numpy":
        return stored[()] if isinstance(target, np.generic) else stored
    array = jnp.asarray(stored)
    if leaf.container == "key":
        array = jax.random.wrap_key_data(array, impl=leaf.implementation)
    elif leaf.weak_type:
        array = _weakly_typed(array)
    return placed(array, sharding_of(target))


def _abstract_array(leaf: LeafMetadata, sharding: jax.sharding.Sharding | None) -> Any:
    dtype = jnp.dtype(leaf.dtype)
    if leaf.container != "jax" or sharding is None:
        return np.empty(leaf.shape, dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _weakly_typed(array: Array) -> Array:
    number = jnp.zeros((), array.dtype).item()
    return jnp.broadcast_to(jnp.asarray(number), array.shape).at[...].set(array)
