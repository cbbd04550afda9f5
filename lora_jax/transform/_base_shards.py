"""How a base is put on devices and cut over a mesh: all parts of a deferred one as the weight."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from lora_jax._compat import varying_axes
from lora_jax.quantization._formats import FORMATS
from lora_jax.quantization._packing import group_of
from lora_jax.quantization._placement import leaf_specs, parts
from lora_jax.quantization._weight import QuantizedWeight, block_numbers
from lora_jax.transform._deferred import Cast, dequantized


def placed_base(base: Any, where: Any, put: Callable[[Array, Any], Array]) -> Any:
    """Returns a base with its arrays put somewhere.

    Args:
      base: the base.
      where: a device, a memory space or a sharding of the whole base.
      put: puts an array onto one of these.
    """
    if isinstance(base, Cast):
        return dataclasses.replace(base, base=placed_base(base.base, where, put))
    if not isinstance(base, QuantizedWeight):
        return put(dequantized(base), where)
    if not isinstance(where, NamedSharding):
        return jax.tree.map(lambda leaf: put(leaf, where), base)
    specs = leaf_specs(base, tuple(where.spec), dict(where.mesh.shape))

    def put_leaf(leaf: Array, spec: PartitionSpec) -> Array:
        return put(leaf, NamedSharding(where.mesh, spec, memory_kind=where.memory_kind))

    return jax.tree.map(put_leaf, base, specs)


def base_for_shards(
    base: Any, spec: Sequence[Any] | PartitionSpec, mesh_shape: Mapping[str, int]
) -> Any:
    """Returns a base whose parts can be cut as `spec` cuts it, block by block.

    Scales that are quantised run across features, and are dequantised where a feature is cut. A
    weight that is cut within a block is dequantised.
    """
    if isinstance(base, Cast):
        return dataclasses.replace(base, base=base_for_shards(base.base, spec, mesh_shape))
    if not isinstance(base, QuantizedWeight):
        return dequantized(base)
    if not _is_cut_between_blocks(base, spec, mesh_shape):
        return base.dequantize()
    batch = base.batch_ndim
    if all(cut is None for cut in tuple(spec)[batch:]):
        return base
    return dataclasses.replace(
        base,
        scales=block_numbers(base.scales, batch),
        offsets=None if base.offsets is None else block_numbers(base.offsets, batch),
    )


def base_specs(base: Any, spec: Any, mesh_shape: Mapping[str, int]) -> Any:
    """Returns the spec of each array of a base that `base_for_shards` returned."""
    if isinstance(base, Cast):
        return dataclasses.replace(base, base=base_specs(base.base, spec, mesh_shape))
    return leaf_specs(base, spec, mesh_shape) if isinstance(base, QuantizedWeight) else spec


def local_base(
    base: Any, spec: Sequence[Any] | PartitionSpec, mesh_shape: Mapping[str, int]
) -> Any:
    """Returns a base on one shard, where its arrays are cut already."""
    if isinstance(base, Cast):
        return dataclasses.replace(base, base=local_base(base.base, spec, mesh_shape))
    if not isinstance(base, QuantizedWeight):
        return base
    first, *rest = base.blocked_shape
    first //= parts(_cut_of(base, base.blocked[0], spec), mesh_shape)
    return dataclasses.replace(base, blocked_shape=(first, *rest))


def gathered_base(
    base: Any, axis: int, count: int, gather: Callable[[Array, int], Array], *, is_tiled: bool
) -> Any | None:
    """Returns a base with the shards of all devices joined part by part, or None if it can't be.

    Args:
      base: the base on one device.
      axis: the axis of the base along which shards are joined, or the new one.
      count: the number of shards.
      gather: joins an array of all devices along one of its axes.
      is_tiled: whether shards are joined along an axis that the base has.
    """
    if isinstance(base, Cast):
        inner = gathered_base(base.base, axis, count, gather, is_tiled=is_tiled)
        return None if inner is None else dataclasses.replace(base, base=inner)
    if not isinstance(base, QuantizedWeight):
        return None
    batch, place = base.batch_ndim, axis - base.ndim
    if axis < batch or (not is_tiled and axis == 0):
        return jax.tree.map(lambda leaf: gather(leaf, axis), base)
    if not is_tiled or isinstance(base.scales, QuantizedWeight):
        return None
    numbers = [each for each in (base.scales, base.offsets) if each is not None]
    if place in base.features:
        at = batch + 1 + base.features.index(place)
        scales, *offsets = (gather(each, at) for each in numbers)
        shape = base.blocked_shape
    elif place == base.blocked[0] and _is_whole(base, math.prod(base.blocked_shape)):
        at = batch
        scales, *offsets = (each if base.block is None else gather(each, at) for each in numbers)
        shape = (count * base.blocked_shape[0], *base.blocked_shape[1:])
    else:
        return None
    return dataclasses.replace(
        base,
        codes=gather(base.codes, at),
        scales=scales,
        offsets=offsets[0] if offsets else None,
        blocked_shape=shape,
    )


def varying_axes_of(base: Any) -> frozenset[str]:
    """Returns the mesh axes over which a base in `shard_map` varies."""
    return frozenset[str]().union(*map(varying_axes, jax.tree.leaves(base)))


def _is_cut_between_blocks(
    base: QuantizedWeight, spec: Sequence[Any] | PartitionSpec, mesh_shape: Mapping[str, int]
) -> bool:
    first, *others = base.blocked
    if any(_cut_of(base, axis, spec) is not None for axis in others):
        return False
    count = parts(_cut_of(base, first, spec), mesh_shape)
    size = math.prod(base.blocked_shape)
    return count == 1 or (base.blocked_shape[0] % count == 0 and _is_whole(base, size // count))


def _is_whole(base: QuantizedWeight, size: int) -> bool:
    """Says whether so many neighbours fill whole blocks, and bytes that no others share."""
    in_bytes, _ = group_of(FORMATS[base.format].bits)
    return size % math.lcm(base.block or 1, in_bytes) == 0


def _cut_of(base: QuantizedWeight, axis: int, spec: Sequence[Any] | PartitionSpec) -> Any:
    cuts = (*spec, *(None,) * (base.ndim - len(spec)))
    return cuts[base.ndim + axis]
