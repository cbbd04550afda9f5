"""Whether adapters that were saved belong to the params that they are put on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from lora_jax._folders import CheckpointError
from lora_jax._paths import leaves_with_paths, listed, nearest_paths
from lora_jax._shapes import factor_shapes, layers_shape, sizes
from lora_jax._weight import is_adapter_node
from lora_jax.checkpoint._metadata import WeightMetadata
from lora_jax.checkpoint._nodes import adapter_nodes, saved_arrays
from lora_jax.checkpoint._placement import sharding_of


def check_fits(source: Path, metadata: Mapping[str, WeightMetadata], params: PyTree) -> None:
    """Raises a `CheckpointError` that names the path unless all adapters fit plain params."""
    leaves = dict(leaves_with_paths(params, is_leaf=is_adapter_node))
    wrapped = [path for path, leaf in leaves.items() if is_adapter_node(leaf)]
    if wrapped:
        raise CheckpointError(
            f"`params` is wrapped already at {listed(wrapped)}; expected plain params: "
            "restore(path, unwrap(params))."
        )
    for path, weight in metadata.items():
        if path not in leaves:
            raise CheckpointError(
                f"the checkpoint {source} adapts '{path}', which `params` does not have; the "
                f"nearest paths are {listed(nearest_paths(path, leaves))}. Expected the params of "
                "the model that it was saved from."
            )
        misfit = _misfit(weight, leaves[path])
        if misfit:
            raise CheckpointError(f"the checkpoint {source} does not fit at '{path}': {misfit}")


def shardings_of(
    source: Path, metadata: Mapping[str, WeightMetadata], like: PyTree
) -> dict[tuple[str, str], jax.sharding.Sharding | None]:
    """Returns the sharding that `like` has for each array, by path and name."""
    arrays = {path: saved_arrays(path, node) for path, node in adapter_nodes(like, "like").items()}
    for path, weight in metadata.items():
        expected = {name: array.shape for name, array in weight.arrays.items()}
        given = {name: tuple(array.shape) for name, array in arrays.get(path, {}).items()}
        if given != expected:
            raise CheckpointError(
                f"the checkpoint {source} does not fit `like` at '{path}': it has arrays of the "
                f"shapes {expected} there, and `like` {given or 'no adapter'}; expected a tree "
                "that is wrapped as the saved one was."
            )
    return {
        (path, name): sharding_of(array)
        for path, by_name in arrays.items()
        for name, array in by_name.items()
    }


def _misfit(weight: WeightMetadata, leaf: Any) -> str | None:
    """Returns what keeps `weight` from standing at `leaf`, or None."""
    shape = tuple(getattr(leaf, "shape", ()))
    if shape != weight.shape:
        return f"it has a weight of shape {weight.shape} there, and `params` one of shape {shape}."
    if weight.kind == "FullWeight":
        dtype = str(getattr(leaf, "dtype", type(leaf).__name__))
        return (
            None
            if dtype == weight.dtype
            else f"that weight was trained in full as {weight.dtype}, and `params` has {dtype}; "
            f"cast it with astype('{weight.dtype}')."
        )
    return _factor_misfit(weight)


def _factor_misfit(weight: WeightMetadata) -> str | None:
    axes, rank = weight.axes, weight.rank
    if axes is None or rank is None or len(axes) != len(weight.shape):
        return f"its axes are {axes} and its rank {rank} for a weight of shape {weight.shape}."
    if weight.layers is not None and "batch" not in axes:
        return f"it adapts the layers {weight.layers} of a weight with the axes {axes}."
    adapted = layers_shape(weight.shape, axes, weight.layers)
    A_shape, B_shape = factor_shapes(adapted, axes, rank)
    by_name = {"lora_A": A_shape, "lora_B": B_shape}
    if "initial_A" in weight.arrays:
        # `resize` may have given the adapter another rank since.
        initial_rank = weight.arrays["initial_A"].shape[-1]
        initial_shapes = factor_shapes(adapted, axes, initial_rank)
        by_name["initial_A"], by_name["initial_B"] = initial_shapes
    by_name["magnitude"] = sizes(adapted, axes, "batch", "out")
    for name, array in weight.arrays.items():
        if name == "scale":
            continue
        expected, shape = by_name[name], array.shape
        # Stacked adapters have one more axis in front.
        if shape[-len(expected) :] != expected:
            return (
                f"its {name} has shape {shape}; expected {expected} for a weight of shape "
                f"{weight.shape} with axes {axes} and rank {rank}."
            )
    return None
