"""What a checkpoint says about each adapted weight."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax._algebra import lora_weight
from lora_jax._shapes import Axes, Layers
from lora_jax._weight import FullWeight
from lora_jax.checkpoint._nodes import AdapterNode


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

    @classmethod
    def of(cls, node: AdapterNode, arrays: Mapping[str, Any]) -> "WeightMetadata":
        """Returns what is to be said about a node of which `arrays` are stored."""
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
        )

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "WeightMetadata":
        arrays = {name: ArrayMetadata.from_json(each) for name, each in entry["arrays"].items()}
        lists = {
            name: None if entry.get(name) is None else tuple(entry[name])
            for name in ("axes", "layers")
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
        if not weight._is_complete():
            raise ValueError(
                f"a {weight.kind} of {sorted(arrays)}; expected a LoRAWeight of lora_A, lora_B and "
                "scale, or a FullWeight of value"
            )
        return weight

    def node(self, weight: Any, arrays: Mapping[str, Any]) -> AdapterNode:
        """Returns the node that was saved, on another original weight."""
        if self.kind == "FullWeight":
            return FullWeight(base=weight, **arrays)
        assert self.axes is not None
        return lora_weight(weight, **arrays, axes=self.axes, layers=self.layers, frozen=self.frozen)

    def _is_complete(self) -> bool:
        if self.kind == "FullWeight":
            return set(self.arrays) == {"value"}
        optional = set(self.arrays) - {"lora_A", "lora_B", "scale"}
        return (
            self.kind == "LoRAWeight"
            and len(self.arrays) - len(optional) == 3
            and optional - {"magnitude"} in ({"initial_A", "initial_B"}, set())
        )


def _alpha(scale: np.ndarray, rank: int) -> float | list[float]:
    # For the reader: the digits that float32 does not have would only be noise.
    alpha: float | list[float] = np.round(scale.astype(np.float64) * rank, 6).tolist()
    return alpha
