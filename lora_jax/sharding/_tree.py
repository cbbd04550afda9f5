"""The shardings of a wrapped tree, and a tree of shapes that has them."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from lora_jax._node_shardings import node_shardings
from lora_jax._partition import names_of, placed_shapes, uncut
from lora_jax._paths import PathIndex, listed
from lora_jax._row_selection import RowSelection
from lora_jax._weight import AdapterNode, is_adapter_node, is_node
from lora_jax.quantization._foreign import ForeignWeight
from lora_jax.quantization._programs import leaf_shardings
from lora_jax.quantization._weight import QuantizedWeight
from lora_jax.sharding._rules import CheckedRules, Rules


def of(wrapped: Any, mesh: Mesh | None = None, *, rules: Rules | None = None) -> Any:
    """Returns a tree like `wrapped` with a `NamedSharding` in place of each array.

    A factor is cut as its weight is, on the axes that they share; along the rank it is not cut. So
    are magnitudes and norms. What is on no mesh, a scale among others, is whole on every device.

    Use the tree as `in_shardings` and `out_shardings` of `jax.jit`, with `jax.device_put`, and with
    `abstract`. `split` makes halves of it, as of `wrapped`.

    Args:
      wrapped: what `wrap` returned, or plain params; arrays or `jax.ShapeDtypeStruct`.
      mesh: the mesh; by default the one that the weights are cut over. A weight on another mesh is
        cut over the axes of these names.
      rules: partitions of one's own, by regular expressions that match whole segments of a path, of
        which the first counts. One that matches a weight cuts the weight, and what is beside it
        follows; one that matches a leaf beside it, such as `"lora_A|lora_B"`, cuts that leaf alone.

    Returns:
      The tree of shardings.

    Raises:
      ValueError: no weight is on a mesh and `mesh` is not given, or weights are on several; or a
        rule matches nothing, names an unknown axis or does not fit a leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> rules = {"kernel": P("fsdp", "tensor")}
      >>> shardings = lora_jax.sharding.of(wrapped, mesh, rules=rules)
      >>> shardings["kernel"].lora_A.spec == P("fsdp", None)
      True
      >>> wrapped = jax.device_put(wrapped, shardings)
    """
    index = PathIndex.of(wrapped, is_node)
    mesh = mesh_of_arrays(wrapped, "wrapped") if mesh is None else mesh
    paths = [each for path, leaf in index.items() for each in (path, *_paths_beside(path, leaf))]
    checked = CheckedRules.of(rules or {}, mesh, paths)

    def shardings(path: str, leaf: Any) -> Any:
        node = _on_cut_weight(path, leaf, checked)
        return _with_own_rules(path, node, node_shardings(node), checked)

    return index.mapped(shardings)


def abstract(tree: Any, shardings: Any = None) -> Any:
    """Returns a tree of `jax.ShapeDtypeStruct`, which compiles and restores without arrays.

    Args:
      tree: a tree of arrays, or of `jax.ShapeDtypeStruct`.
      shardings: a tree of shardings like it, such as `of` returns; by default the arrays' own.

    Returns:
      The shape, the dtype and the sharding of each leaf.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> lora_jax.sharding.abstract({"bias": jnp.ones(3)})["bias"].shape
      (3,)
    """
    if shardings is None:
        leaves, structure = jax.tree.flatten(tree)
        own = [placed_shapes(leaf, getattr(leaf, "sharding", None)) for leaf in leaves]
        return jax.tree.unflatten(structure, own)
    return placed_shapes(tree, shardings)


def mesh_of_arrays(tree: Any, argument: str) -> Any:
    """Returns the mesh that the arrays of a tree are cut over; `argument` names it in an error."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    meshes = dict.fromkeys(each.mesh for each in shardings if isinstance(each, NamedSharding))
    if len(meshes) != 1:
        found = f"on {len(meshes)} meshes" if meshes else "on no mesh"
        raise ValueError(
            f"The weights in `{argument}` are {found}; expected them on one. "
            "sharding.of(wrapped, mesh, rules={'kernel': PartitionSpec(...)}) says how a tree is "
            "cut over a mesh that it is not on yet."
        )
    return next(iter(meshes))


def _paths_beside(path: str, node: Any) -> list[str]:
    """Returns the paths of the arrays beside the weight of a node, and of its nodes."""
    if not is_adapter_node(node):
        return []
    inner = _paths_beside(f"{path}/base", node.base)
    return [f"{path}/{name}" for name in _arrays_beside(node)] + inner


def _arrays_beside(node: AdapterNode) -> dict[str, Any]:
    """Returns the arrays of a node without its base, by their names."""
    beside = {
        field.name: getattr(node, field.name)
        for field in dataclasses.fields(node)
        if field.name != "base" and not field.metadata.get("static")
    }
    # The numbers of single rows are whole on every device, whatever the rules say of a lora_A.
    return {
        name: leaf
        for name, leaf in beside.items()
        if leaf is not None and not isinstance(leaf, RowSelection)
    }


def _on_cut_weight(path: str, node: Any, rules: CheckedRules) -> Any:
    """Returns a node whose weight is abstract and cut over the mesh, or that weight itself."""
    if is_adapter_node(node):
        return dataclasses.replace(node, base=_on_cut_weight(path, node.base, rules))
    sharding = rules.sharding_of(path, node)
    if sharding is None:
        own = jax.tree.map(lambda leaf: _own_sharding(path, leaf, rules.mesh), node)
        return placed_shapes(node, own)
    if isinstance(node, ForeignWeight):
        raise ValueError(
            f"`rules` cuts '{path}', a quantised array of another library, whose parts have shapes "
            "of their own; expected it to be on the mesh already, and no rule for it."
        )
    if isinstance(node, QuantizedWeight):
        whole = jax.ShapeDtypeStruct(node.shape, node.dtype, sharding=sharding)
        return placed_shapes(node, leaf_shardings(whole, node))
    return placed_shapes(node, sharding)


def _own_sharding(path: str, leaf: Any, mesh: Mesh) -> NamedSharding:
    """Returns how an array is cut, on this mesh if it is on another one."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return uncut(mesh)
    unknown = [name for cut in sharding.spec for name in names_of(cut) if name not in mesh.shape]
    if unknown:
        raise ValueError(
            f"'{path}' is cut over {unknown[0]!r} of another mesh, and `mesh` has the axes "
            f"{listed(mesh.axis_names)}; expected `rules` that say how it is cut over these."
        )
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _with_own_rules(path: str, node: Any, shardings: Any, rules: CheckedRules) -> Any:
    """Returns the shardings of a node with those that rules give to arrays beside its weight."""
    if not is_adapter_node(node):
        return shardings
    base = _with_own_rules(f"{path}/base", node.base, shardings.base, rules)
    found = {
        name: rules.sharding_of(f"{path}/{name}", leaf, within=path)
        for name, leaf in _arrays_beside(node).items()
    }
    own = {name: sharding for name, sharding in found.items() if sharding is not None}
    return dataclasses.replace(shardings, base=base, **own)
