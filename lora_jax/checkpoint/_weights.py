"""The adapted weights of a checkpoint: what of each is stored and said, and where it fits."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lora_jax._folders import CheckpointError
from lora_jax._nodes import adapter_nodes, check_plain, check_whole
from lora_jax._originals import lora_bank, lora_weight
from lora_jax._paths import leaves_with_paths, listed, nearest_paths
from lora_jax._row_selection import RowSelection
from lora_jax._shapes import Axes, Layers, factor_shapes, layers_shape, side_size, sizes
from lora_jax._weight import AdapterNode, FullWeight, is_lora_weight

# What restoring finds in the params or computes from them.
_OF_THE_BASE = frozenset({"base", "squared_norm", "norm"})


@dataclasses.dataclass(frozen=True)
class ArrayMetadata:
    """What an array must be when it is read again."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, array: Any) -> "ArrayMetadata":
        return cls(tuple(array.shape), str(array.dtype))

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "ArrayMetadata":
        return cls(**{**entry, "shape": tuple(entry["shape"])})


@dataclasses.dataclass(frozen=True)
class WeightMetadata:
    """What was trained at one path. A weight trained in full has no rank, alpha and axes."""

    kind: str
    shape: tuple[int, ...]
    dtype: str
    arrays: Mapping[str, ArrayMetadata]
    rank: int | None = None
    alpha: float | list[float] | None = None
    axes: Axes | None = None
    layers: Layers | None = None
    frozen: tuple[str, ...] = ()
    encoding: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, node: AdapterNode, arrays: Mapping[str, Any]) -> "WeightMetadata":
        """Returns what a checkpoint says of a node whose `arrays` it stores."""
        common: dict[str, Any] = {
            "kind": type(node).__name__,
            "shape": tuple(node.shape),
            "dtype": str(node.dtype),
            "arrays": {name: ArrayMetadata.of(array) for name, array in arrays.items()},
        }
        if isinstance(node, FullWeight):
            return cls(**common)
        return cls(
            **common,
            rank=node.rank,
            alpha=_alpha(np.asarray(node.scale), node.rank),
            axes=node.axes,
            layers=node.layers,
            frozen=node.frozen,
            encoding=node.encoding if is_lora_weight(node) else None,
        )

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "WeightMetadata":
        arrays = {name: ArrayMetadata.from_json(each) for name, each in entry["arrays"].items()}
        lists = {
            name: None if entry.get(name) is None else tuple(entry[name])
            for name in ("axes", "encoding", "layers")
        }
        weight = cls(
            **{
                **entry,
                **lists,
                "shape": tuple(entry["shape"]),
                "arrays": arrays,
                "frozen": tuple(entry.get("frozen", ())),
            }
        )
        if weight.kind == "LoRAWeight" and "scale" in arrays and arrays["scale"].shape:
            # Earlier versions wrote a bank, of which each slot has a scale, as a LoRAWeight.
            weight = dataclasses.replace(weight, kind="LoRABank")
        if not weight._is_complete():
            raise ValueError(
                f"a {weight.kind} of {sorted(arrays)}; expected a LoRAWeight or a LoRABank of "
                "lora_A, lora_B and scale, a LoRAWeight of rows, lora_B and scale, or a FullWeight "
                "of value"
            )
        return weight

    def node(self, weight: Any, arrays: Mapping[str, Any]) -> AdapterNode:
        """Returns the node that was saved, on another original weight."""
        if self.kind == "FullWeight":
            return FullWeight(base=weight, **arrays)
        assert self.axes is not None
        static: dict[str, Any] = {
            "axes": self.axes,
            "layers": self.layers,
            "frozen": self.frozen,
        }
        leaves = leaves_of_arrays(arrays, self.shape, self.axes)
        if self.kind == "LoRABank":
            return lora_bank(weight, **leaves, **static)
        return lora_weight(weight, **leaves, **static, encoding=self.encoding)

    def _is_complete(self) -> bool:
        if self.kind == "FullWeight":
            return set(self.arrays) == {"value"}
        if self.kind == "LoRAWeight" and set(self.arrays) == {"rows", "lora_B", "scale"}:
            return True
        optional = set(self.arrays) - {"lora_A", "lora_B", "scale"}
        return (
            self.kind in ("LoRABank", "LoRAWeight")
            and len(self.arrays) - len(optional) == 3
            and optional - {"magnitude"} in ({"initial_A", "initial_B"}, set())
        )


def saved_arrays(path: str, node: AdapterNode) -> dict[str, Any]:
    """Returns the arrays of a node that are stored, by their name."""
    check_whole(path, node)
    leaves = {
        field.name: getattr(node, field.name)
        for field in dataclasses.fields(node)
        if not field.metadata.get("static") and field.name not in _OF_THE_BASE
    }
    if isinstance(leaves.get("lora_A"), RowSelection):
        leaves = {"rows": leaves.pop("lora_A").rows, **leaves}
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}


def leaves_of_arrays(
    arrays: Mapping[str, Any], shape: tuple[int, ...], axes: Axes
) -> dict[str, Any]:
    """Returns the leaves of a node from its `saved_arrays`, on a weight of this shape."""
    leaves = dict(arrays)
    if "rows" in leaves:
        leaves["lora_A"] = RowSelection(leaves.pop("rows"), side_size(shape, axes, "in"))
    return leaves


def check_fits(source: Path, metadata: Mapping[str, WeightMetadata], params: PyTree) -> None:
    """Raises a `CheckpointError` that names the path unless all adapters fit plain params."""
    check_plain(params, "expected plain params: restore(path, unwrap(params)).")
    leaves = dict(leaves_with_paths(params))
    for node_path, weight in metadata.items():
        path = leaf_path(node_path, leaves)
        if path not in leaves:
            raise CheckpointError(
                f"the checkpoint {source} adapts '{path}', which `params` does not have; the "
                f"nearest paths are {listed(nearest_paths(path, leaves))}. Expected the params of "
                "the model that it was saved from."
            )
        misfit = _misfit(weight, leaves[path])
        if misfit:
            raise CheckpointError(f"the checkpoint {source} does not fit at '{path}': {misfit}")


def leaf_path(path: str, leaves: Collection[str]) -> str:
    """Returns the path of the leaf that the node at a path stands on, at whatever level."""
    while path not in leaves and path.endswith("/base"):
        path = path.removesuffix("/base")
    return path


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


def sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
    """Returns where an array has to be; None where JAX is free to move it, as it is by default."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return getattr(leaf, "sharding", None)


def placed(array: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """Returns `array` where it has to be."""
    return array if sharding is None else jax.device_put(array, sharding)


def _alpha(scale: np.ndarray, rank: int) -> float | list[float]:
    # For people who read the file: digits beyond those of float32 would only be noise.
    alpha: float | list[float] = np.round(scale.astype(np.float64) * rank, 6).tolist()
    return alpha


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
    by_name: dict[str, tuple[int, ...]] = {"lora_A": A_shape, "lora_B": B_shape, "rows": (rank,)}
    if "initial_A" in weight.arrays:
        # `resize` may have changed the adapter's rank since.
        initial_rank = weight.arrays["initial_A"].shape[-1]
        initial_shapes = factor_shapes(adapted, axes, initial_rank)
        by_name["initial_A"], by_name["initial_B"] = initial_shapes
    by_name["magnitude"] = sizes(adapted, axes, "batch", "out")
    for name, array in weight.arrays.items():
        if name == "scale":
            continue
        expected, shape = by_name[name], array.shape
        # Those of a bank have an axis of slots in front.
        if shape[-len(expected) :] != expected:
            return (
                f"its {name} has shape {shape}; expected {expected} for a weight of shape "
                f"{weight.shape} with axes {axes} and rank {rank}."
            )
    return None
