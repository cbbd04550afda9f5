"""The shardings of an optimiser's state."""

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax._partition import uncut
from lora_jax.sharding._tree import abstract, mesh_of_arrays


def of_state(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """Returns a tree like `optimizer.init(params)` with a `NamedSharding` in place of each array.

    A moment is cut as its parameter is. JAX's own types say so: `optimizer.init` is traced with
    parameters whose types hold their shardings, so that a state of other shapes, such as
    Adafactor's rows and columns, is cut along the axes that it keeps.

    Args:
      optimizer: any optax transformation, such as `lora_jax.optimizer(optax.adam(1e-3))`.
      params: what it trains, cut over a mesh: a wrapped tree or its trainable half; arrays, or
        shapes as `abstract` gives them. What is on no mesh is whole on every device.

    Returns:
      The tree of shardings.

    Raises:
      ValueError: `params` is on no mesh, or on several.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax, optax
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> shardings = lora_jax.sharding.of(wrapped, mesh, rules={"kernel": P("fsdp", "tensor")})
      >>> optimizer = lora_jax.optimizer(optax.adam(1e-3))
      >>> state = lora_jax.sharding.of_state(optimizer, jax.device_put(wrapped, shardings))
      >>> init = jax.jit(optimizer.init, out_shardings=state)
    """
    mesh = mesh_of_arrays(params, "params")
    typed = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )

    def known(leaf: Any) -> NamedSharding:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return NamedSharding(typed, PartitionSpec())
        return NamedSharding(typed, sharding.spec)

    with jax.sharding.use_abstract_mesh(typed):
        state = jax.eval_shape(optimizer.init, abstract(params, jax.tree.map(known, params)))
    return jax.tree.map(lambda leaf: _on(mesh, leaf), state)


def _on(mesh: Mesh, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    # A constant has no type of its own.
    return uncut(mesh) if leaf.sharding is None else NamedSharding(mesh, leaf.sharding.spec)
