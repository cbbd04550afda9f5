"""Ops that look up parts of a weight by numbers that depend on the activations."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.battery.registry import numbers, op


@op(explicit=False)
def taken(w, v, x):
    ids = numbers(x, 5)
    return {
        "first axis": jnp.take(w, ids % w.shape[0], axis=0),
        "second axis": jnp.take(w, ids % w.shape[1], axis=1),
        "last axis": jnp.take(w, ids % w.shape[-1], axis=-1),
    }


@op(explicit=False)
def taken_in_each_mode(w, v, x):
    ids = numbers(x, 5)
    return {
        "clip": jnp.take(w, ids, axis=0, mode="clip"),
        "wrap": jnp.take(w, ids, axis=1, mode="wrap"),
        "fill": jnp.take(w, ids, axis=0, mode="fill", fill_value=0),
        "fill with a number": w.at[ids].get(mode="fill", fill_value=1.5),
        "promised": w.at[ids % w.shape[0]].get(mode="promise_in_bounds"),
    }


@op(explicit=False)
def indexed_by_arrays(w, v, x):
    ids = numbers(x, 5) % 4
    others = numbers(x[:, 5:], 5) % 6
    return {
        "rows": w[ids - 2],
        "elements": w[ids, others],
        "part of rows": w[ids, 1:3],
        "constant rows": w[np.array([2, 0, -1])],
        "last axis": w[..., ids - 1],
        "apart": w[ids, ..., others],
    }


@op(explicit=False)
def looked_up_by_vmap(w, v, x):
    ids = numbers(x, 4) % 4
    return {
        "rows": jax.vmap(lambda each: w[each])(ids),
        "slices": jax.vmap(lambda i: jax.lax.dynamic_slice_in_dim(w, i - 2, 2))(ids[:, 0]),
        "of rows": jax.vmap(lambda row, i: row[i], (0, 0), 0)(w, ids[0]),
        "last axis": jax.vmap(lambda column: column[ids], -1, -1)(w),
    }


@op(explicit=False)
def taken_along_an_axis(w, v, x):
    ids = numbers(x, w.size)[0].reshape(w.shape)
    return {
        f"axis {axis}": jnp.take_along_axis(w, ids % w.shape[axis], axis=axis)
        for axis in range(w.ndim)
    }


@op()
def one_hot(w, v, x):
    ids = numbers(x, 5) % w.shape[0]
    return {"rows": jnp.tensordot(jax.nn.one_hot(ids, w.shape[0], dtype=w.dtype), w, 1)}


@op(explicit=False)
def tied(w, v, x):
    """An embedding that is looked up, and multiplied with transposed."""
    rows = w[numbers(x, 5) % w.shape[0]]
    axes = tuple(range(1, w.ndim))
    return {"logits": jnp.tensordot(rows, w, (tuple(axis + 1 for axis in axes), axes))}


@op()
def picked_and_multiplied(w, v, x):
    """The weight of an expert for each row of activations."""
    experts = w[numbers(x, 1)[:, 0] % w.shape[0]]
    return {"each": jnp.einsum("ni,ni...->n...", x[:, : w.shape[1]], experts)}
