"""How a weight is cut over a mesh, and how arrays computed from it are cut to match."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax._compat import is_tracer
from lora_jax._shapes import Axes, Layers, factor_shapes, layers_shape, positions, sizes


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which axes of a mesh cut each axis of an array.

    Attributes:
      mesh: the mesh; of a traced array its abstract mesh.
      cuts: for each axis of the array what stands in a `PartitionSpec`: None, or one or several
        axes of the mesh.
    """

    mesh: Any
    cuts: tuple[Any, ...]

    @classmethod
    def of(cls, array: Any) -> "Partition | None":
        """Returns the partition of an array; None without a mesh, or where tracing hides it."""
        traced = is_tracer(array)
        sharding = jax.typeof(array).sharding if traced else getattr(array, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
            return None
        if traced and not _explicit_axes(sharding.mesh):
            return None
        spec = tuple(sharding.spec)
        return cls(sharding.mesh, spec + (None,) * (len(array.shape) - len(spec)))

    def sharding(self, shape: Sequence[int], axes: Sequence[int | None]) -> NamedSharding:
        """Returns how an array is cut that shares axes with the partitioned one.

        Args:
          shape: its shape.
          axes: for each of its axes the one that it shares, or None; None stays uncut, and so does
            an axis that was shortened to a size that the mesh does not divide.
        """
        cuts = [
            None if axis is None or size % self._parts(self.cuts[axis]) else self.cuts[axis]
            for size, axis in zip(shape, axes, strict=True)
        ]
        return NamedSharding(self.mesh, PartitionSpec(*cuts))

    def _parts(self, cut: Any) -> int:
        return math.prod(self.mesh.shape[name] for name in names_of(cut))


def base_sharding(base: Any) -> NamedSharding | None:
    """Returns how what is computed in place of a weight is cut; None as in `Partition.of`."""
    partition = Partition.of(base)
    if partition is None:
        return None
    return partition.sharding(base.shape, range(len(base.shape)))


def factor_shardings(
    base: Any, axes: Axes, layers: Layers | None, rank: int, *, in_slots: bool = False
) -> tuple[NamedSharding, NamedSharding] | None:
    """Returns how the factors of a weight are cut: as it is, and not along the rank.

    Args:
      base: the weight.
      axes: the role of each of its axes.
      layers: the adapted indices of its first batch axis, or None.
      rank: the rank.
      in_slots: whether the factors are those of a bank, with an axis of slots in front.
    """
    partition = Partition.of(base)
    if partition is None:
        return None
    A_shape, B_shape = factor_shapes(layers_shape(base.shape, axes, layers), axes, rank)
    A_axes = (*positions(axes, "batch", "in"), None)
    B_axes = (*positions(axes, "batch"), None, *positions(axes, "out"))
    front = (1,) * in_slots, (None,) * in_slots
    return (
        partition.sharding((*front[0], *A_shape), (*front[1], *A_axes)),
        partition.sharding((*front[0], *B_shape), (*front[1], *B_axes)),
    )


def feature_sharding(
    base: Any, axes: Axes, layers: Layers | None, *, in_slots: bool = False
) -> NamedSharding | None:
    """Returns how one number for each output feature of a weight is cut: (*batch, *out).

    The arguments are those of `factor_shardings`.
    """
    partition = Partition.of(base)
    if partition is None:
        return None
    shape = sizes(layers_shape(base.shape, axes, layers), axes, "batch", "out")
    front = (1,) * in_slots, (None,) * in_slots
    return partition.sharding((*front[0], *shape), (*front[1], *positions(axes, "batch", "out")))


def is_abstract(weight: Any) -> bool:
    """Says whether a weight has a shape and no numbers."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(weight))


def placed_shapes(tree: Any, shardings: Any) -> Any:
    """Returns the shapes of a tree of arrays, numbers or shapes, with these shardings."""

    def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype, sharding=sharding)

    return jax.tree.map(placed, tree, shardings)


def uncut(mesh: Any) -> NamedSharding:
    """Returns the sharding of an array that every device of a mesh holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def cut_as(shardings: Any, function: Callable[..., Any], *arrays: Any) -> Any:
    """Returns `function(*arrays)` with its results cut as `shardings` say.

    Within it the compiler decides how values are cut, on a mesh with explicit axes too: reshaping
    and decomposing a cut matrix has no rule there.

    Args:
      shardings: a sharding for each result, a tree that is a prefix of the results; or None, which
        leaves everything to JAX.
      function: the function.
      *arrays: trees of arrays.
    """
    if shardings is None:
        return function(*arrays)
    explicit = _explicit_axes(jax.tree.leaves(shardings)[0].mesh)
    if not explicit:
        return jax.lax.with_sharding_constraint(function(*arrays), shardings)
    # Cuts along automatic axes of the same mesh are left to the compiler.
    typed = jax.tree.map(lambda sharding: _restricted(sharding, explicit), shardings)
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=typed)(*arrays)


def _restricted(sharding: NamedSharding, names: Sequence[str]) -> NamedSharding:
    """Returns a sharding without the cuts along other axes of the mesh."""
    cuts = [cut if set(names_of(cut)) <= set(names) else None for cut in sharding.spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*cuts))


def names_of(cut: Any) -> tuple[str, ...]:
    """Returns the axes of the mesh in an entry of a `PartitionSpec`."""
    return () if cut is None else (cut,) if isinstance(cut, str) else tuple(cut)


def _explicit_axes(mesh: Any) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)
