"""Ops that only move, cut or join weights."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tests.battery.registry import IS_STRICT, traced, weight_op


@weight_op()
def transposed(w, v, x):
    return {
        "all axes": w.T,
        "first axis last": jnp.moveaxis(w, 0, -1),
        "last axis first": jnp.moveaxis(w, -1, 0),
    }


@weight_op(explicit=False)
def reshaped_to_fewer_axes(w, v, x):
    return {
        "flat": w.reshape(-1),
        "first axes merged": w.reshape(-1, *w.shape[2:]),
        "last axes merged": w.reshape(*w.shape[:-2], -1),
    }


@weight_op(explicit=False)
def reshaped_to_more_axes(w, v, x):
    return {
        "first axis split": w.reshape(2, w.shape[0] // 2, *w.shape[1:]),
        "last axis split": w.reshape(*w.shape[:-1], w.shape[-1] // 2, 2),
        "unit axes": w.reshape(w.shape[0], 1, *w.shape[1:], 1),
    }


@weight_op(explicit=False)
def reshaped_across_axes(w, v, x):
    return {
        "flat and back": w.reshape(-1).reshape(w.shape),
        "other sizes": w.reshape(w.shape[1], w.shape[0], *w.shape[2:]),
        "transposed and flat": w.T.reshape(-1),
    }


@weight_op()
def unit_axes(w, v, x):
    return {
        "squeezed": jnp.squeeze(jnp.expand_dims(w, (0, 2)), (0, 2)),
        "expanded": jnp.expand_dims(w, (1, w.ndim + 1)),
    }


@weight_op()
def broadcast(w, v, x):
    return {
        "first": jnp.broadcast_to(w, (3, *w.shape)),
        "last": jnp.broadcast_to(w[..., None], (*w.shape, 3)),
        "between": jnp.broadcast_to(w[:, None], (w.shape[0], 3, *w.shape[1:])),
    }


@weight_op(explicit=False)
def repeated(w, v, x):
    return {"tiled": jnp.tile(w, 2), "repeated": jnp.repeat(w, 2, axis=0)}


@weight_op(explicit=False)
def broadcast_along_a_unit_axis(w, v, x):
    """Joining leaves a window on an axis of size 1, which then grows."""
    one = jnp.stack([w])
    none = jnp.zeros((0, *w.shape), w.dtype)
    joined = jnp.concatenate([none, w[None]])
    joined_row = jnp.concatenate([none[:, 0], w[1:2]])
    return {
        "stacked": jnp.broadcast_to(one, (3, *w.shape)),
        "joined": jnp.broadcast_to(joined, (3, *w.shape)),
        "row": jnp.broadcast_to(joined_row, (3, *w.shape[1:])),
        "window": jnp.broadcast_to(jnp.stack([v, w])[1:], (3, *w.shape)),
    }


@weight_op()
def reversed_axes(w, v, x):
    return {
        "first": jnp.flip(w, 0),
        "last": jnp.flip(w, -1),
        "all of joined": jnp.flip(jnp.concatenate([w, v, v])),
    }


@weight_op(explicit=False)
def sliced(w, v, x):
    joined = jnp.concatenate([w, v], axis=1)
    return {
        "strided": w[1::2],
        "last axis": w[..., 1:-1],
        "both": w[1:3, ::3],
        "backwards": w[::-2, ::-1],
        "joined": joined[:, 4:9],
    }


@weight_op(explicit=not IS_STRICT)
def rolled(w, v, x):
    return {"first": jnp.roll(w, 1, axis=0), "last": jnp.roll(w, -2, axis=-1)}


@weight_op(explicit=False)
def dynamic_slices(w, v, x):
    """Starts that are too small or too large are clamped; JAX counts negative ones from the end."""
    first = {
        f"from {start}": jax.lax.dynamic_slice_in_dim(w, traced(x, start), 2)
        for start in (1, -1, -3, -20, 20)
    }
    last = {
        f"from {start} of the last": jax.lax.dynamic_slice_in_dim(w, traced(x, start), 3, axis=-1)
        for start in (1, -2, -20, 20)
    }
    starts = [traced(x, start) for start in (-3, 1, -20)[: w.ndim]]
    sizes = (2, 5, 3)[: w.ndim]
    return first | last | {"from anywhere": jax.lax.dynamic_slice(w, starts, sizes)}


@weight_op()
def indexed(w, v, x):
    size = w.shape[0]
    fixed = {f"at {i}": w[i] for i in (1, -1, -size)}
    unknown = {f"at traced {i}": w[traced(x, i)] for i in (1, -1, -size, -size - 2, size + 1)}
    return fixed | unknown


@weight_op(explicit=False)
def indexed_along_other_axes(w, v, x):
    last = w.shape[-1]
    return {
        "second": w[:, traced(x, 1)],
        "last": w[..., traced(x, -1)],
        "last, too small": w[..., traced(x, -last - 1)],
        "last, too large": w[..., traced(x, last)],
        "two": w[traced(x, -2), ..., traced(x, 1)],
    }


@weight_op(explicit=False)
def split(w, v, x):
    first, second = jnp.split(w, 2)
    left, middle, right = jnp.split(w, (1, 4), axis=-1)
    return {
        "second": second,
        "swapped": jnp.concatenate([second, first]),
        "middle": middle,
        "ends": jnp.concatenate([right, left], axis=-1),
        "of joined": jnp.split(jnp.concatenate([w, v], axis=1), 4, axis=1)[1],
    }


@weight_op(explicit=False)
def concatenated(w, v, x):
    ones = jnp.ones_like(x, shape=w.shape)
    return {
        "first axis": jnp.concatenate([w, v]),
        "second axis": jnp.concatenate([v, w], axis=1),
        "between arrays": jnp.concatenate([ones, w, ones[:1]]),
        "with itself": jnp.concatenate([w, w]),
    }


@weight_op(explicit=False)
def concatenated_and_cut(w, v, x):
    joined = jnp.concatenate([w, v, w], axis=-1)
    return {
        "transposed": joined.T,
        "reshaped": joined.reshape(-1)[:192],
        "cut": joined[..., 3:-3],
        "dynamic": jax.lax.dynamic_slice_in_dim(joined, traced(x, 5), 4, axis=-1),
    }


@weight_op()
def stacked(w, v, x):
    return {
        "first": jnp.stack([w, v]),
        "last": jnp.stack([v, w], axis=-1),
        "with itself": jnp.stack([w, w], axis=1),
        "one of them": jnp.stack([v, w])[1],
    }


@weight_op(explicit=False)
def padded(w, v, x):
    widths = [(1, 2, 0), (-1, 1, 1), (0, 0, 2)][: w.ndim]
    return {
        "with zeros": jnp.pad(w, 1),
        "with ones": jax.lax.pad(w, jnp.ones((), w.dtype), widths),
    }


@weight_op()
def kept_in_place(w, v, x):
    sharding = jax.sharding.PartitionSpec(*(None,) * w.ndim)
    barred, _ = jax.lax.optimization_barrier((w, x))
    named = checkpoint_name(w, "weight")
    constrained = w if jax.sharding.get_abstract_mesh().empty else _constrained(w, sharding)
    return {
        "barrier": barred,
        "copy": jnp.copy(w),
        "name": named,
        "constrained": constrained,
        "put": jax.device_put(w),
        "stopped": jax.lax.stop_gradient(w),
    }


def _constrained(w, sharding):
    mesh = jax.sharding.get_abstract_mesh()
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(w, sharding)
    return jax.lax.with_sharding_constraint(w, sharding)


@weight_op(meshes=False, symbolic=False)
def constrained_to_devices(w, v, x):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(*(None,) * (w.ndim - 1), "d")
    sharding = jax.NamedSharding(mesh, spec)
    jitted = jax.jit(lambda w: w * 2, in_shardings=sharding, out_shardings=sharding)
    return {"cut": jax.lax.with_sharding_constraint(w, sharding), "jitted": jitted(w)}
