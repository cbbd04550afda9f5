"""Quantising weights where they lie: one compiled program for each way, cut over a mesh as they."""

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding

from lora_jax._partition import Partition, cut_as, placed_shapes
from lora_jax._shapes import AnyArray, Axes
from lora_jax.quantization._encode import Encoding, quantized
from lora_jax.quantization._placement import leaf_specs
from lora_jax.quantization._weight import QuantizedWeight


def quantized_in_place(
    leaf: AnyArray | jax.ShapeDtypeStruct, axes: Axes, encoding: Encoding
) -> QuantizedWeight:
    """Returns a weight quantised, its arrays cut over the mesh of the weight.

    Args:
      leaf: the weight; an abstract one gives abstract arrays.
      axes: the role of each of its axes.
      encoding: how.
    """
    program = _program(axes, encoding)
    # Without its sharding: nothing maps over an axis that is cut over an explicit mesh.
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    abstract = jax.eval_shape(program, jax.ShapeDtypeStruct(leaf.shape, dtype))
    shardings = leaf_shardings(leaf, abstract)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return abstract if shardings is None else placed_shapes(abstract, shardings)
    if shardings is None:
        return program(leaf)
    batch = jax.tree.leaves(shardings)[0].spec[: abstract.batch_ndim]
    is_cut = any(cut is not None for cut in batch)
    return _cut_program(axes, encoding, shardings, at_once=is_cut)(leaf)


def leaf_shardings(leaf: Any, quantized_leaf: QuantizedWeight) -> QuantizedWeight | None:
    """Returns how each array of a quantised weight is cut; None without a mesh.

    Args:
      leaf: the weight that is cut over a mesh.
      quantized_leaf: the same weight quantised; its arrays may be abstract.
    """
    partition = Partition.of(leaf)
    if partition is None:
        return None
    specs = leaf_specs(quantized_leaf, partition.cuts, dict(partition.mesh.shape))
    return jax.tree.map(lambda spec: NamedSharding(partition.mesh, spec), specs)


@functools.lru_cache(maxsize=256)
def _program(axes: Axes, encoding: Encoding) -> Any:
    return jax.jit(lambda weight: quantized(weight, axes, encoding))


@functools.lru_cache(maxsize=256)
def _cut_program(
    axes: Axes, encoding: Encoding, shardings: QuantizedWeight, *, at_once: bool
) -> Any:
    computed = functools.partial(quantized, axes=axes, encoding=encoding, at_once=at_once)
    return jax.jit(lambda weight: cut_as(shardings, computed, weight))
