"""Ops that scale, add, convert or change the elements of weights."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.battery.registry import op, weight_op


@weight_op()
def negated_and_scaled(w, v, x):
    return {
        "negated": -w,
        "doubled": 2.0 * w,
        "halved": w / 3.0,
        "times": w * (x[0, 0] + 3),
        "over": w / (x[0, 1] + 3),
    }


@weight_op()
def scaled_by_arrays(w, v, x):
    column = x[0, : w.shape[0]].reshape(-1, *(1,) * (w.ndim - 1))
    row = x[1, : w.shape[-1]] + 3
    return {
        "first axis": w * column,
        "last axis": w / row,
        "both axes": w * column / row,
        "every element": w * x[1, : w.size].reshape(w.shape),
        "joined": jnp.concatenate([w, v], axis=-1) * jnp.concatenate([row, -row]),
    }


@weight_op()
def inverted(w, v, x):
    """The weight where a rule for a product or quotient might take the other operand for it."""
    return {"over the weight": 2.0 / (w * w + 1), "of two": w * v, "with itself": w * w}


@weight_op()
def added(w, v, x):
    return {
        "two": w + v,
        "difference": v - w,
        "an array": w + x[0, : w.size].reshape(w.shape),
        "from an array": 1.0 - w,
        "with itself": w + w,
        "from itself": w - 4 * w,
    }


@weight_op()
def added_of_other_shapes(w, v, x):
    return {"row": w + v[:1], "joined": jnp.concatenate([w, v]) + jnp.concatenate([v, w])}


@weight_op(tolerance=2e-2)
def converted(w, v, x):
    return {
        "to float32": w.astype(jnp.float32),
        "to bfloat16": w.astype(jnp.bfloat16),
        "there and back": w.astype(jnp.float16).astype(w.dtype),
        "joined": jnp.concatenate([w.astype(jnp.bfloat16), v.astype(jnp.bfloat16)]),
    }


@weight_op(tolerance=2e-2, meshes=False)
def rounded(w, v, x):
    return {"reduced": jax.lax.reduce_precision(w, 8, 7)}


@weight_op()
def masked(w, v, x):
    mask = (np.arange(w.size) % 3 > 0).reshape(w.shape)
    return {
        "where": jnp.where(mask, w, jnp.zeros_like(w)),
        "of two": jnp.where(mask, w, v),
        "triangle": jnp.triu(w),
        "clipped": jnp.clip(w, -0.5, 0.5),
    }


@weight_op(explicit=False)
def overwritten(w, v, x):
    return {
        "row set": w.at[0].set(v[1]),
        "row added": w.at[1].add(1.0),
        "block": jax.lax.dynamic_update_slice(w, v[:1] * 2, (2,) + (0,) * (w.ndim - 1)),
        "into an array": jnp.zeros_like(w).at[..., 0].set(w[..., 1]),
    }


@weight_op()
def nonlinear(w, v, x):
    return {"sine": jnp.sin(w), "square": w**2, "root": jnp.sqrt(w * w + 1)}


@weight_op()
def reduced(w, v, x):
    return {
        "sum": w.sum(0),
        "mean": w.mean(-1),
        "running": jnp.cumsum(w, axis=0),
        "norm": jnp.sqrt(jnp.sum(w * w, axis=0) + 1),
    }


@op()
def linear_in_elements(w, v, x):
    """A product written with elementwise ops."""
    column = x[:, : w.shape[0]].reshape(x.shape[0], -1, *(1,) * (w.ndim - 1))
    return {"by hand": (column * w).sum(1)}
