"""Collectives within `shard_map`, on weights that are cut along their first or last axis."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from tests.battery.registry import contracted, op


def _on_shards(fn, w, x, axis):
    """Returns fn(shard of w, x), summed over two devices, with `w` cut along an axis."""
    here = jax.sharding.get_abstract_mesh()
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,)) if here.empty else None
    spec = PartitionSpec(*("d" if i == axis % w.ndim else None for i in range(w.ndim)))
    if AxisType.Explicit in here.axis_types:
        w = jax.sharding.reshard(w, spec)

    def shard(w, x):
        return jax.lax.psum(fn(w, x), "d")

    sharded = jax.shard_map(
        shard, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=PartitionSpec()
    )
    return sharded(w, x)


def _number(x):
    return jax.lax.axis_index("d").astype(x.dtype) + 1


def _on_first_and_last(fn, w, x):
    return {
        name: _on_shards(lambda w, x, axis=axis: fn(w, x, axis), w, x, axis)
        for name, axis in (("cut along the first", 0), ("cut along the last", w.ndim - 1))
    }


@op(symbolic=False)
def partial_products(w, v, x):
    """A product over the axis that is cut, as tensor parallelism has it."""

    def partial(w, x, axis):
        return contracted(x, w) * _number(x)

    return _on_first_and_last(partial, w, x)


@op(symbolic=False)
def gathered(w, v, x):
    """Each device gathers the weight that it computes with, as FSDP has it."""

    def whole(w, x, axis):
        return contracted(x, jax.lax.all_gather(w, "d", axis=axis, tiled=True)) * _number(x)

    def stacked(w, x, axis):
        return contracted(x, jax.lax.all_gather(w, "d", axis=1)) * _number(x)

    return {
        **_on_first_and_last(whole, w, x),
        **{f"stacked, {name}": y for name, y in _on_first_and_last(stacked, w, x).items()},
    }


@op(symbolic=False)
def summed(w, v, x):
    def total(w, x, axis):
        return contracted(x, jax.lax.psum(w * _number(x), "d"))

    def mean(w, x, axis):
        return contracted(x, jax.lax.pmean(w, "d")) * _number(x)

    return {
        **_on_first_and_last(total, w, x),
        **{f"mean, {name}": y for name, y in _on_first_and_last(mean, w, x).items()},
    }


@op(symbolic=False)
def permuted(w, v, x):
    def from_the_other(w, x, axis):
        return contracted(x, jax.lax.ppermute(w, "d", [(0, 1), (1, 0)])) * _number(x)

    def from_one(w, x, axis):
        return contracted(x, jax.lax.ppermute(w, "d", [(0, 1)])) * _number(x)

    return {
        **_on_first_and_last(from_the_other, w, x),
        **{f"one way, {name}": y for name, y in _on_first_and_last(from_one, w, x).items()},
    }


@op(symbolic=False)
def exchanged(w, v, x):
    """`all_to_all` cuts one axis and joins another; `psum_scatter` sums and cuts."""

    def swapped(w, x, axis):
        cut = 1 if axis == 0 else 0
        moved = jax.lax.all_to_all(w, "d", cut, axis, tiled=True)
        return contracted(x, moved) * _number(x)

    def scattered(w, x, axis):
        cut = 1 if axis == 0 else 0
        part = jax.lax.psum_scatter(w, "d", scatter_dimension=cut, tiled=True)
        return contracted(x, part) * _number(x)

    return {
        **_on_first_and_last(swapped, w, x),
        **{f"scattered, {name}": y for name, y in _on_first_and_last(scattered, w, x).items()},
    }


@op(symbolic=False)
def cut_by_device_number(w, v, x):
    """Each device takes its own part of a weight that all hold."""
    here = jax.sharding.get_abstract_mesh()
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,)) if here.empty else None
    whole = PartitionSpec()
    if AxisType.Explicit in here.axis_types:
        w = jax.sharding.reshard(w, whole)

    def shard(w, x):
        number = jax.lax.axis_index("d")
        first = jax.lax.dynamic_slice_in_dim(w, number * 2, 2)
        last = jax.lax.dynamic_slice_in_dim(w, number * 3 - 1, 3, axis=-1)
        results = contracted(x, first), contracted(x, last), contracted(x, w[number])
        return jax.lax.psum(tuple(y * _number(x) for y in results), "d")

    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(whole, whole), out_specs=whole)
    first, last, one = sharded(w, x)
    return {"first": first, "last": last, "one": one, "outside": contracted(x, jnp.copy(w))}
