"""LoRA dropout: on the adapter's input only, with an independent mask for each use."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from lora_jax._compat import varying_axes
from lora_jax.transform._product import sharding_of

# A number is kept or dropped by 16 random bits: half a word of the generator's.
_LEVELS = 2**16


@dataclasses.dataclass(frozen=True)
class NoDropout:
    """The dropout of evaluation: it drops nothing. It has the methods of `Dropout`."""

    is_active: ClassVar[bool] = False

    @property
    def settings(self) -> None:
        """None: there is nothing to set."""

    def at(self, place: int) -> "NoDropout":
        """Returns itself."""
        del place
        return self

    def key_of(self, use: int = 0) -> None:
        """Returns None: no body needs a key."""
        del use

    def dropped_out(self, x: Array, use: int = 0) -> Array:
        """Returns x."""
        del use
        return x

    def scaled(self, scale: Array) -> Array:
        """Returns the scale."""
        return scale

    def with_key(self, key: PRNGKeyArray | None) -> "NoDropout":
        """Returns itself."""
        del key
        return self

    def within_mesh(self, axes: frozenset[str]) -> "NoDropout":
        """Returns itself."""
        del axes
        return self


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Draws a mask for each use of an adapter, from the key and the position of the use alone.

    Attributes:
      rate: the probability of dropping an element, rounded to a multiple of 1/65536.
      key: the key of the body that is being evaluated; None for a body that is given one later.
      place: which equation of that body is being evaluated.
      mesh_axes: the mesh axes of a `shard_map` around it, along which devices that hold other
        inputs draw other masks. Devices that hold the same input draw the same.
    """

    is_active: ClassVar[bool] = True

    rate: float
    key: PRNGKeyArray | None
    place: int = 0
    mesh_axes: frozenset[str] = frozenset()

    @property
    def settings(self) -> tuple[float, frozenset[str]]:
        """Everything but the key on which a body rewritten with this dropout depends."""
        return self.rate, self.mesh_axes

    def at(self, place: int) -> "Dropout":
        """Returns the dropout of another equation of the same body."""
        return dataclasses.replace(self, place=place)

    def key_of(self, use: int = 0) -> PRNGKeyArray:
        """Returns the key of one use within this equation, which no other use in the body has."""
        assert self.key is not None
        key = jax.random.fold_in(_on_this_mesh(self.key), self.place)
        return jax.random.fold_in(key, use) if use else key

    def dropped_out(self, x: Array, use: int = 0) -> Array:
        """Returns x with elements dropped; the scale compensates by 1 / (1 - rate).

        Args:
          x: an adapter's input.
          use: tells apart the masks that one equation draws.
        """
        key = self.key_of(use)
        for axis in sorted(self.mesh_axes & varying_axes(x)):
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        return jnp.where(self._is_kept(key, x), x, jnp.zeros_like(x))

    def scaled(self, scale: Array) -> Array:
        """Returns an adapter's scale over 1 - rate; applied there, it costs no precision."""
        kept = 1 - self._dropped_levels / _LEVELS
        return scale / jnp.asarray(kept, scale.dtype)

    def with_key(self, key: PRNGKeyArray | None) -> "Dropout":
        """Returns the dropout of a body that has a key of its own."""
        return dataclasses.replace(self, key=key, place=0)

    def within_mesh(self, axes: frozenset[str]) -> "Dropout":
        """Returns the dropout of the shards of a function that is mapped over these mesh axes."""
        return dataclasses.replace(self, mesh_axes=self.mesh_axes | axes)

    @property
    def _dropped_levels(self) -> int:
        return min(round(self.rate * _LEVELS), _LEVELS - 1)

    def _is_kept(self, key: PRNGKeyArray, x: Array) -> Array:
        """Returns a mask for x, in which an element is False with the rate's probability.

        Two elements share a word of 32 random bits; `jax.random.bits` of 16 would draw a word for
        each. Over explicit mesh axes the words are cut as x is, and so is the mask.
        """
        *before, last = x.shape or (1,)
        words_shape = (*before, -(-last // 2))
        sharding = sharding_of(x)
        words = jax.random.bits(
            key,
            words_shape,
            jnp.uint32,
            out_sharding=None if sharding is None else _but_the_last(sharding, len(words_shape)),
        )
        halves = [words & jnp.uint32(_LEVELS - 1), words >> jnp.uint32(16)]
        levels = jnp.concatenate(halves, axis=-1)[..., :last].reshape(x.shape)
        if sharding is not None:
            levels = jax.sharding.reshard(levels, sharding)
        return levels >= jnp.uint32(self._dropped_levels)


def _but_the_last(sharding: NamedSharding, ndim: int) -> NamedSharding:
    """Returns a sharding with the last axis whole."""
    axes = (*sharding.spec, *(None,) * ndim)[: ndim - 1]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes, None))


def _on_this_mesh(key: PRNGKeyArray) -> PRNGKeyArray:
    """Returns a key as the equation at hand takes it, whose mesh may differ in the axes' types."""
    mesh = jax.sharding.get_abstract_mesh()
    own = jax.typeof(key).sharding.mesh
    if mesh.empty or own.empty or mesh == own:
        return key
    return jax.sharding.reshard(key, NamedSharding(mesh, PartitionSpec()))
