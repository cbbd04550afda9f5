"""Fingerprints of frozen weights, by which a checkpoint recognises the base that it belongs to.

For an array with the bits b and the place i of each element,

    fingerprint = Σ_i mix(b_i + φ·i)  mod 2³²

Integer sums have no rounding and no order: every device, platform and sharding gives the same
number. It is computed where the array is, in one read and without a copy, so that it costs what
looking at the weights once costs (milliseconds for a gigabyte on an accelerator).

Of an array that is known to rounding only, with the values x, the signed sums

    σ_k = Σ_i ±_k(i) · round(x_i / step)  mod 2³²

are as cheap, and almost the same where x is: changing each of n values by about δ changes them by
about √n · δ / step, since the signs ± are as good as random.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

from lora_jax._compat import is_tracer, without_mesh
from lora_jax._dtypes import epsilon
from lora_jax._folders import CheckpointError
from lora_jax._nodes import NodeIndex, map_nodes
from lora_jax._originals import original
from lora_jax._paths import leaves_with_paths, listed
from lora_jax._processes import is_shared, of_all_processes
from lora_jax._weight import (
    AdapterNode,
    LoRABank,
    LoRAWeight,
    changes_base,
    has_factors,
    innermost_base,
    is_adapter_node,
)
from lora_jax.checkpoint._weights import leaf_path
from lora_jax.quantization._weight import format_of, is_quantized

# 2³² over the golden ratio, and the multipliers of MurmurHash3's last step.
_GOLDEN = 0x9E3779B1
_MIXING = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))

_SIGNED_SUMS = 4
_LARGEST_NUMBER = 2**30

# In units of the root mean square of a weight times its dtype's precision: one step of the numbers
# that are summed, and how far apart two weights may be that are the same to rounding.
_STEP, _TOLERANCE = 1 / 16, 8

Terms = Sequence[UInt32[Array, "..."]]


class BaseMismatchWarning(UserWarning):
    """Adapters are restored onto weights of another dtype than they were saved beside."""


@dataclasses.dataclass(frozen=True)
class BaseFingerprint:
    """What a checkpoint says of a weight that adapters were saved beside.

    Attributes:
      dtype: its dtype; of a quantised weight, its format.
      bits: the fingerprint of each of its arrays.
      sums: its signed sums, in place of `bits` where an initialiser changed the base, so that the
        original is known to rounding only. Where it quantised the base, `bits` are those of that.
      step: the step of the signed sums.
    """

    dtype: str
    bits: tuple[int, ...] | None = None
    sums: tuple[int, ...] | None = None
    step: float | None = None

    @classmethod
    def of(cls, node: LoRAWeight | LoRABank) -> "BaseFingerprint":
        dtype = _dtypes(node.base)
        if not changes_base(node) or is_quantized(node.base):
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

    A weight that is trained in full replaces its base, so any base will do.
    """
    return {
        path: BaseFingerprint.of(node)
        for path, node in nodes.items()
        if has_factors(node) and not is_adapter_node(node.base) and _has_numbers(node.base)
    }


def check_same_base(
    source: Path, saved: Mapping[str, BaseFingerprint], params: PyTree, restored: PyTree
) -> None:
    """Raises a `CheckpointError` if `params` are other weights, and warns of another dtype.

    Args:
      source: the checkpoint.
      saved: what it says of each weight, by path.
      params: the weights that the adapters are restored beside.
      restored: the tree with the adapters. A quantised base that an initialiser made of the weight
        is compared itself: rounding gave the same codes, or it was another weight.
    """
    leaves = dict(leaves_with_paths(params))
    made = {
        leaf_path(path, leaves): node.base
        for path, node in NodeIndex.of(restored).levels.items()
        if changes_base(node) and is_quantized(node.base)
    }
    leaves = {**leaves, **made}
    saved = {leaf_path(path, leaves): each for path, each in saved.items()}
    known = {path: each for path, each in saved.items() if _has_numbers(leaves[path])}
    recast = {path: each for path, each in known.items() if _dtypes(leaves[path]) != each.dtype}
    others = [
        path for path, each in known.items() if path not in recast and not each.is_of(leaves[path])
    ]
    if others:
        raise CheckpointError(
            f"the checkpoint {source} belongs to another base: `params` has other numbers than the "
            f"weights that it was saved beside at {listed(others)}. Expected the params that were "
            "wrapped. restore(..., check_base=False) takes any that fit, such as these if "
            "arithmetic.on_original_base, serving.bank or arithmetic.resize had restored a weight "
            "to rounding before it was saved."
        )
    if recast:
        path = next(iter(recast))
        warnings.warn(
            f"the checkpoint {source} was saved beside weights in {recast[path].dtype}, and "
            f"`params` has {_dtypes(leaves[path])} at {listed(list(recast))}. The adapters are the "
            "same, but compute with rounded weights, and whether these belong to the same model "
            "can't be checked. restore(..., check_base=False) accepts them.",
            BaseMismatchWarning,
            stacklevel=3,
        )


def frozen_fingerprints(wrapped: PyTree) -> dict[str, int]:
    """Returns the fingerprint of each array that a training checkpoint leaves out, by its path."""
    bases = map_nodes(innermost_base, wrapped)
    arrays = leaves_with_paths(bases, is_leaf=lambda _: False)
    leaves = [(path, leaf) for path, leaf in arrays if hasattr(leaf, "dtype")]
    for path, leaf in leaves:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"`wrapped` has no numbers at '{path}', only a shape; expected the weights of the "
                "run, by which its checkpoints are recognised."
            )
    return {path: fingerprint(leaf) for path, leaf in leaves}


def fingerprint(array: Any) -> int:
    """Returns the fingerprint of the bits of an array."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return _sums_over_parts(_mixed_bits, array, 0.0)[0]


def signed_sums(array: Any, step: float) -> tuple[int, ...]:
    """Returns the signed sums of an array of real numbers, in steps of this size."""
    return _sums_over_parts(_signed_numbers, array, step)


def _bits(weight: Any) -> tuple[int, ...]:
    return tuple(fingerprint(array) for array in jax.tree.leaves(weight))


def _dtypes(weight: Any) -> str:
    """Returns the dtypes that a weight's arrays have in JAX, which may be narrower than NumPy's.

    Of a quantised weight it is the format.
    """
    if is_quantized(weight):
        return str(format_of(weight))
    return ", ".join(str(jnp.result_type(array)) for array in jax.tree.leaves(weight))


def _has_numbers(weight: Any) -> bool:
    return not any(
        isinstance(array, jax.ShapeDtypeStruct) or is_tracer(array)
        for array in jax.tree.leaves(weight)
    )


def _root_mean_square(weight: Any) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(weight.astype(jnp.float32)))))


def _sums_over_parts(terms: Callable[..., Terms], array: Any, step: float) -> tuple[int, ...]:
    """Returns the sums of `terms(part, places, step)` over an array, wherever it is.

    Each process sums up its own parts, on the devices that hold them.
    """
    with without_mesh():
        sums_of_parts = [
            _sums_of_part(terms, array.shape, part, _starts(index, array.ndim), np.float32(step))
            for part, index in _parts(array)
        ]
    total = _added(sums_of_parts)
    if is_shared(array):
        is_counted = any(each.replica_id == 0 for each in array.addressable_shards)
        total = _added(of_all_processes(total * np.uint32(is_counted)))
    return tuple(map(int, total))


def _added(sums: Any) -> np.ndarray:
    return np.asarray(np.sum(np.array(sums, np.uint32), axis=0, dtype=np.uint32))


def _parts(array: Any) -> list[tuple[Any, tuple[slice, ...]]]:
    """Returns the parts of an array that this process sums up, beside their places.

    A part that several devices hold is one for the first of them. A process that has none returns
    another one, by which it learns how many sums there are.
    """
    if not isinstance(array, jax.Array):
        return [(np.asarray(array), ())]
    if array.is_fully_replicated:
        return [(array.addressable_shards[0].data, ())]
    # No sharding is changed, and none has to be known.
    parts = [each for each in array.addressable_shards if each.replica_id == 0]
    return [(each.data, each.index) for each in parts or array.addressable_shards[:1]]


def _starts(index: tuple[slice, ...], axes: int) -> np.ndarray:
    """Returns where a part of an array begins on each axis."""
    starts = [part.start or 0 for part in index]
    return np.array(starts or [0] * axes, np.uint32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums_of_part(
    terms: Callable[..., Terms],
    shape: tuple[int, ...],
    part: Array,
    starts: UInt32[Array, " axes"],
    step: Array,
) -> Sequence[UInt32[Array, ""]]:
    """Returns the sums over the part of an array of `shape` that begins at `starts`."""
    places = jnp.zeros(part.shape, jnp.uint32)
    for axis, size in enumerate(shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis)
        # Horner's scheme for the place in the whole array, which may wrap around.
        places = places * jnp.uint32(size % 2**32) + along + starts[axis]
    summed = terms(part, places, step)
    # In one pass: for one sum after the other, XLA on CPU first writes what it adds to memory.
    return jax.lax.reduce(
        summed,
        [np.uint32(0)] * len(summed),
        lambda left, right: [a + b for a, b in zip(left, right, strict=True)],
        tuple(range(summed[0].ndim)),
    )


def _mixed_bits(part: Array, places: UInt32[Array, "..."], step: Array) -> Terms:
    del step
    words = _words(part)
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, words.ndim - 1)
    places = places[..., None] * jnp.uint32(words.shape[-1]) + along
    # A second sum, which nothing needs, so that both are taken in one pass.
    return [_mixed(words + places * jnp.uint32(_GOLDEN)), words]


def _signed_numbers(part: Array, places: UInt32[Array, "..."], step: Array) -> Terms:
    numbers = jnp.nan_to_num(jnp.round(part.astype(jnp.float32) / step))
    numbers = jnp.clip(numbers, -_LARGEST_NUMBER, _LARGEST_NUMBER).astype(jnp.int32)
    random = _mixed(places * jnp.uint32(_GOLDEN))
    return [
        jnp.where((random >> k) & 1, numbers, -numbers).astype(jnp.uint32)
        for k in range(_SIGNED_SUMS)
    ]


def _mixed(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Returns words of which each bit depends on all bits."""
    for shift, multiplier in _MIXING:
        words = (words ^ (words >> shift)) * jnp.uint32(multiplier)
    return words ^ (words >> 16)


def _words(array: Array) -> UInt32[Array, "... words"]:
    """Returns the bits of each element as numbers of 32 bits, along one more axis."""
    shape = array.shape
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    info = jnp.iinfo if jnp.issubdtype(array.dtype, jnp.integer) else jnp.finfo
    bits = info(array.dtype).bits
    if bits < 8:  # no type of JAX has its bits; all its numbers are among those of float32
        array, bits = array.astype(jnp.float32), 32
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(bits, 32)}"))
    return words.astype(jnp.uint32).reshape(*shape, -1)
