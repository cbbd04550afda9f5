"""How each array of a node is cut over the mesh of its weight."""

import dataclasses
from typing import Any

import jax

from lora_jax._partition import (
    Partition,
    base_sharding,
    factor_shardings,
    feature_sharding,
    uncut,
)
from lora_jax._row_selection import RowSelection
from lora_jax._weight import (
    FullWeight,
    LoRABank,
    LoRAWeight,
    innermost_base,
    is_adapter_node,
    is_bank,
)


def node_shardings(node: Any) -> Any:
    """Returns a node with a `NamedSharding` in place of each array.

    Args:
      node: a node on a weight that is cut over a mesh, or the weight itself; its arrays may be
        abstract.
    """
    if not is_adapter_node(node):
        return jax.tree.map(lambda leaf: leaf.sharding, node)
    base = node_shardings(node.base)
    weight = innermost_base(node)
    if isinstance(node, FullWeight):
        return FullWeight(base=base, value=base_sharding(weight) or weight.sharding)
    arrays = _shardings_beside(node, weight)
    held = {name: sharding for name, sharding in arrays.items() if getattr(node, name) is not None}
    if isinstance(node.lora_A, RowSelection):
        held["lora_A"] = dataclasses.replace(node.lora_A, rows=held["scale"])
    return dataclasses.replace(node, base=base, **held)


def _shardings_beside(node: LoRAWeight | LoRABank, weight: Any) -> dict[str, Any]:
    """Returns how each array beside a weight is cut, by its name.

    Of a quantised array of another library it is not known how it is cut: what is beside it is
    whole.
    """
    mesh = jax.tree.leaves(weight)[0].sharding.mesh
    if Partition.of(weight) is None:
        fields = [
            field.name for field in dataclasses.fields(node) if not field.metadata.get("static")
        ]
        return {name: uncut(mesh) for name in fields if name != "base"}
    in_slots = is_bank(node)
    factors: Any = factor_shardings(weight, node.axes, node.layers, node.rank, in_slots=in_slots)
    features: Any = feature_sharding(weight, node.axes, node.layers)
    in_front: Any = feature_sharding(weight, node.axes, node.layers, in_slots=in_slots)
    by_name = {
        "lora_A": factors[0],
        "lora_B": factors[1],
        "scale": uncut(mesh),
        "magnitude": in_front,
        "squared_norm": features,
    }
    if in_slots:
        return by_name | {"norm": in_front}
    return by_name | {"initial_A": factors[0], "initial_B": factors[1]}
