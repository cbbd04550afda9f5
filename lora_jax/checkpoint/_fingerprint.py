"""A fingerprint of the frozen weights, so that a run goes on with those that it began with.

For each frozen array with the bits b and the place i of each element,

    fingerprint = Σ_i mix(b_i + φ·i)  mod 2³²

Integer sums have no rounding and no order: every device, platform and sharding gives the same
number. It is computed where the array is, one read and no copy, so that it costs what one look at
the weights costs (milliseconds for a gigabyte on an accelerator), once in a run.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

from lora_jax._folders import CheckpointError
from lora_jax._paths import leaves_with_paths
from lora_jax._weight import is_adapter_node

# 2³² over the golden ratio, and the multipliers of MurmurHash3's last step.
_GOLDEN = 0x9E3779B1
_MIXING = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))


def frozen_fingerprints(wrapped: PyTree) -> dict[str, int]:
    """Returns the fingerprint of each array that a training checkpoint leaves out, by its path."""
    bases = jax.tree.map(
        lambda node: node.base if is_adapter_node(node) else node, wrapped, is_leaf=is_adapter_node
    )
    return {
        path: _fingerprint(path, leaf)
        for path, leaf in leaves_with_paths(bases)
        if hasattr(leaf, "dtype")
    }


def _fingerprint(path: str, array: Any) -> int:
    if isinstance(array, jax.ShapeDtypeStruct):
        raise CheckpointError(
            f"`wrapped` has no numbers at '{path}', only a shape; expected the weights of the run, "
            "by which a checkpoint is recognised."
        )
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if not isinstance(array, jax.Array):
        return int(_sum_of_part(np.asarray(array), array.shape, _starts((), array.ndim)))
    # Part by part, each on its own device: no sharding is changed, and none has to be known.
    sums = [
        _sum_of_part(shard.data, array.shape, _starts(shard.index, array.ndim))
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]
    return sum(int(each) for each in sums) % 2**32


def _starts(index: tuple[slice, ...], axes: int) -> np.ndarray:
    """Returns where a part of an array begins on each axis."""
    starts = [part.start or 0 for part in index]
    return np.array(starts or [0] * axes, np.uint32)


@functools.partial(jax.jit, static_argnums=1)
def _sum_of_part(
    part: Array, shape: tuple[int, ...], starts: UInt32[Array, " axes"]
) -> UInt32[Array, ""]:
    """Returns the sum over the part of an array of `shape` that begins at `starts`."""
    words = _words(part)
    places = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate((*shape, words.shape[-1])):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        start = starts[axis] if axis < len(shape) else jnp.uint32(0)
        # Horner's scheme for the place in the whole array, which may wrap around.
        places = places * jnp.uint32(size % 2**32) + along + start
    mixed = words + places * jnp.uint32(_GOLDEN)
    for shift, multiplier in _MIXING:
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(multiplier)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


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
