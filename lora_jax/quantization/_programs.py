"""Quantising weights where they lie: one compiled program for each way, cut over a mesh as they."""

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding

from lora_jax._partition import Partition, cut_as
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
    abstract = jax.eval_shape(program, leaf)
    shardings = leaf_shardings(leaf, abstract)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return abstract if shardings is None else jax.tree.map(_placed, abstract, shardings)
    return program(leaf) if shardings is None else _cut_program(axes, encoding, shardings)(leaf)


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
def _cut_program(axes: Axes, encoding: Encoding, shardings: QuantizedWeight) -> Any:
    return jax.jit(
        lambda weight: cut_as(shardings, lambda each: quantized(each, axes, encoding), weight)
    )


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
