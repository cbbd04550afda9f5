"""The base that adapters were saved beside, in a few numbers, and whether another one is it."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax._algebra import original
from lora_jax._compat import is_tracer
from lora_jax._dtypes import epsilon
from lora_jax._folders import CheckpointError
from lora_jax._paths import leaves_with_paths, listed
from lora_jax._weight import LoRAWeight
from lora_jax.checkpoint._fingerprint import fingerprint, signed_sums
from lora_jax.checkpoint._nodes import AdapterNode

# In units of the root mean square of a weight times its dtype's precision: one step of the numbers
# that are summed, and how far apart two weights may be that are the same to rounding.
_STEP, _TOLERANCE = 1 / 16, 8


class BaseMismatchWarning(UserWarning):
    """Adapters are put on weights of another dtype than those that they were saved beside."""


@dataclasses.dataclass(frozen=True)
class BaseFingerprint:
    """What is known of a weight after adapters were saved beside it.

    Attributes:
      dtype: its dtype; of a weight of several arrays, those of all of them.
      bits: the fingerprint of each of its arrays.
      sums: in place of them where an initialiser changed the base, so that the original is known to
        rounding only: its signed sums.
      step: the step of these.
    """

    dtype: str
    bits: tuple[int, ...] | None = None
    sums: tuple[int, ...] | None = None
    step: float | None = None

    @classmethod
    def of(cls, node: LoRAWeight) -> "BaseFingerprint":
        dtype = _dtypes(node.base)
        if node.initial_A is None:
            return cls(dtype, bits=_bits(node.base))
        weight = original(node)
        step = (
            _STEP * epsilon(weight.dtype) * max(_root_mean_square(x) for x in (node.base, weight))
        )
        step = step or 1.0
        return cls(dtype, sums=signed_sums(weight, step), step=step)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "BaseFingerprint":
        lists = {name: entry[name] and tuple(entry[name]) for name in ("bits", "sums")}
        return cls(**{**entry, **lists})

    def is_of(self, weight: Any) -> bool:
        """Says whether a weight of the same dtype is the one that this was taken of."""
        if self.sums is None or self.step is None:
            return self.bits == _bits(weight)
        tolerance = math.sqrt(math.prod(weight.shape)) * _TOLERANCE / _STEP
        differences = np.subtract(signed_sums(weight, self.step), self.sums).astype(np.int32)
        return bool(np.all(np.abs(differences.astype(np.int64)) <= tolerance))


def base_fingerprints(nodes: Mapping[str, AdapterNode]) -> dict[str, BaseFingerprint]:
    """Returns the fingerprint of each adapted weight whose numbers are there, by path.

    A weight that is trained in full takes the place of its base, so that any base will do.
    """
    return {
        path: BaseFingerprint.of(node)
        for path, node in nodes.items()
        if isinstance(node, LoRAWeight) and _has_numbers(node.base)
    }


def check_same_base(source: Path, saved: Mapping[str, BaseFingerprint], params: PyTree) -> None:
    """Raises a `CheckpointError` if `params` are other weights, and warns of another dtype."""
    leaves = dict(leaves_with_paths(params))
    known = {path: each for path, each in saved.items() if _has_numbers(leaves[path])}
    recast = {path: each for path, each in known.items() if _dtypes(leaves[path]) != each.dtype}
    others = [
        path for path, each in known.items() if path not in recast and not each.is_of(leaves[path])
    ]
    if others:
        raise CheckpointError(
            f"the checkpoint {source} belongs to another base: `params` has other numbers than the "
            f"weights that it was saved beside at {listed(others)}. Expected the params that were "
            "wrapped. restore(..., check_base=False) takes any that fit, such as these where "
            "on_original_base, serving.bank or resize gave back a weight to rounding before it was "
            "saved."
        )
    if recast:
        path = next(iter(recast))
        warnings.warn(
            f"the checkpoint {source} was saved beside weights of dtype {recast[path].dtype}, and "
            f"`params` has {_dtypes(leaves[path])} at {listed(list(recast))}. The adapters are the "
            "same, and compute with rounded weights; whether these are the same model can't be "
            "told. restore(..., check_base=False) says that it is meant.",
            BaseMismatchWarning,
            stacklevel=3,
        )


def _bits(weight: Any) -> tuple[int, ...]:
    return tuple(fingerprint(array) for array in jax.tree.leaves(weight))


def _dtypes(weight: Any) -> str:
    """Returns the dtypes that a weight's arrays have in JAX, which may cut those of NumPy's."""
    return ", ".join(str(jnp.result_type(array)) for array in jax.tree.leaves(weight))


def _has_numbers(weight: Any) -> bool:
    return not any(
        isinstance(array, jax.ShapeDtypeStruct) or is_tracer(array)
        for array in jax.tree.leaves(weight)
    )


def _root_mean_square(weight: Any) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(weight.astype(jnp.float32)))))
