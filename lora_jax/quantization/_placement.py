"""How the arrays of a quantised weight are cut over a mesh where the weight is."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from lora_jax._partition import names_of
from lora_jax.quantization._weight import QuantizedWeight


def leaf_specs(
    weight: QuantizedWeight, spec: Sequence[Any] | PartitionSpec, mesh_shape: Mapping[str, int]
) -> QuantizedWeight:
    """Returns the weight with a `PartitionSpec` in place of each array.

    An array is cut along the batch axes and the features as the weight is. Along the first blocked
    axis it is cut where the mesh divides it. Blocks of scales that are quantised themselves run
    across features: what cuts the weight cuts these in a row, so that no device holds all of them.

    Args:
      weight: the weight; its arrays may be abstract.
      spec: for each axis of the weight what stands in a `PartitionSpec`.
      mesh_shape: the sizes of the axes of the mesh.
    """
    cuts = (*spec, *(None,) * (weight.ndim - len(spec)))
    batch, ndim = weight.batch_ndim, weight.ndim
    in_blocks = cuts[ndim + weight.blocked[0]] if weight.blocked else None
    features = [cuts[ndim + axis] for axis in weight.features]

    def of_array(array: Any) -> PartitionSpec:
        wanted = (*cuts[:batch], in_blocks, *features)
        return PartitionSpec(
            *(
                cut if size % parts(cut, mesh_shape) == 0 else None
                for cut, size in zip(wanted, array.shape, strict=True)
            )
        )

    def in_a_row(numbers: QuantizedWeight) -> tuple[Any, ...]:
        names = tuple(name for cut in (*features, in_blocks) for name in names_of(cut))
        is_divided = names and numbers.shape[batch] % parts(names, mesh_shape) == 0
        return (names,) if is_divided else ()

    def of_numbers(numbers: Any) -> Any:
        if isinstance(numbers, QuantizedWeight):
            return leaf_specs(numbers, (*cuts[:batch], *in_a_row(numbers)), mesh_shape)
        return None if numbers is None else of_array(numbers)

    return dataclasses.replace(
        weight,
        codes=of_array(weight.codes),
        scales=of_numbers(weight.scales),
        offsets=of_numbers(weight.offsets),
        codebook=None if weight.codebook is None else PartitionSpec(*cuts[:batch]),
    )


def parts(cut: Any, mesh_shape: Mapping[str, int]) -> int:
    """Returns into how many parts an entry of a `PartitionSpec` cuts an axis."""
    return math.prod(mesh_shape[name] for name in names_of(cut))
