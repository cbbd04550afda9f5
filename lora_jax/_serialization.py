"""What `jax.export` and Flax need to write the library's nodes to bytes.

`jax.export` writes the structure of a function's arguments beside the function; of a node that is
its name and its static fields, as JSON. Flax's `serialization` (msgpack, `to_bytes`, checkpoints of
a `TrainState`) writes a dictionary of arrays, and takes the static fields from the target that it
restores into. Flax is never imported for it: whoever serialises with it has imported it, and every
node made afterwards, also by a step or by `jax.tree.map`, makes sure that Flax knows it.
"""

import dataclasses
import functools
import json
import sys
from typing import Any, TypeVar

import jax.export

T = TypeVar("T")


def exportable(node_type: type[T]) -> type[T]:
    """Registers a dataclass that is a pytree node for `jax.export`; to be used as a decorator."""
    jax.export.register_pytree_node_serialization(
        node_type,
        serialized_name=f"lora_jax.{node_type.__name__}",
        serialize_auxdata=lambda static_fields: json.dumps(static_fields).encode(),
        deserialize_auxdata=lambda written: _with_tuples(json.loads(written)),
    )
    return node_type


def introduce_to_flax(node_type: type) -> None:
    """Registers a dataclass that is a pytree node with Flax, if Flax is loaded."""
    flax: Any = sys.modules.get("flax.serialization")
    if flax is not None and not flax.is_serializable(node_type):
        flax.register_serialization_state(
            node_type,
            functools.partial(_state_dict, flax),
            functools.partial(_from_state_dict, flax),
        )


def _with_tuples(value: Any) -> Any:
    """Returns lists from JSON as tuples, which static fields are made of."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _state_dict(flax: Any, node: Any) -> dict[str, Any]:
    return {name: flax.to_state_dict(leaf) for name, leaf in _leaves(node).items()}


def _from_state_dict(flax: Any, node: Any, state: dict[str, Any]) -> Any:
    leaves = _leaves(node)
    if set(leaves) != set(state):
        raise ValueError(
            f"The {type(node).__name__} at '{flax.current_path()}' has the leaves "
            f"{sorted(leaves)}, and the state that was read has {sorted(state)}; expected a target "
            "that was wrapped with the same settings."
        )
    read = {
        name: flax.from_state_dict(leaf, state[name], name=name) for name, leaf in leaves.items()
    }
    return dataclasses.replace(node, **read)


def _leaves(node: Any) -> dict[str, Any]:
    """Returns the leaves of a node by name, without those that are None."""
    values = {
        field.name: getattr(node, field.name)
        for field in dataclasses.fields(node)
        if not field.metadata.get("static")
    }
    for value in values.values():
        # A node inside of this one may have been made before Flax was imported.
        if dataclasses.is_dataclass(value):
            introduce_to_flax(type(value))
    return {name: value for name, value in values.items() if value is not None}
