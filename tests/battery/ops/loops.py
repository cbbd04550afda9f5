"""Loops and branches that a weight enters as a stack, a constant or a carried value."""

import functools

import jax
import jax.numpy as jnp

from tests.battery.registry import contracted, op


@op(explicit=False)
def mapped_over_each_axis(w, v, x):
    return {
        f"axis {axis}": jax.lax.map(functools.partial(contracted, x), jnp.moveaxis(w, axis, 0))
        for axis in range(w.ndim)
    }


@op(explicit=False)
def mapped_over_a_transposed_stack(w, v, x):
    return {"transposed": jax.lax.map(functools.partial(contracted, x), w.T)}


@op()
def mapped_after_a_jitted_function(w, v, x):
    """What comes out of a jitted function is used within a loop first, and then beside it."""
    scaled = jax.jit(lambda w: w * (x[0, 0] + 3))(w)
    return {
        "rows": jax.lax.map(functools.partial(contracted, x), scaled),
        "afterwards": contracted(x, scaled),
    }


@op()
def mapped_over_joined_stacks(w, v, x):
    joined = jnp.concatenate([w, v])
    return {
        "joined": jax.lax.map(functools.partial(contracted, x), joined),
        "stacked": jax.lax.map(functools.partial(contracted, x), jnp.stack([v, w])),
        "cut": jax.lax.map(functools.partial(contracted, x), w[1:3]),
    }


@op(explicit=False)
def scanned_in_both_directions(w, v, x):
    def layer(carry, layer):
        y = contracted(x, layer[0]) - contracted(x, layer[1])
        return carry * 0.5 + y, carry

    start = jnp.zeros_like(contracted(x, x[0, : w[0].size].reshape(w[0].shape)))
    forwards = jax.lax.scan(layer, start, (w, v))
    backwards = jax.lax.scan(layer, start, (v, w), reverse=True, unroll=2)
    return {
        "forwards": forwards[0],
        "its steps": forwards[1],
        "backwards": backwards[0],
        "their steps": backwards[1],
    }


@op(explicit=False)
def scanned_within_a_scan(w, v, x):
    def of_row(row):
        return jax.lax.map(lambda inner: contracted(x, inner), row)

    return {"nested": jax.lax.map(of_row, w)}


@op()
def scanned_in_pieces(w, v, x):
    """Layers in groups, as models scan over blocks of layers."""
    groups = w.reshape(2, w.shape[0] // 2, *w.shape[1:])
    return {"groups": jax.lax.map(lambda group: contracted(x, group), groups)}


@op(explicit=False)
def constant_of_a_scan(w, v, x):
    def step(carry, number):
        return carry * 0.5 + number * contracted(x, w), carry

    start = jnp.zeros_like(contracted(x, x[0, : w.size].reshape(w.shape)))
    # Numbers of one sign: what cancels has no error relative to its own size.
    final, steps = jax.lax.scan(step, start, jnp.abs(x[0, :3]) + 1)
    return {"final": final, "steps": steps}


@op()
def returned_by_a_scan(w, v, x):
    def step(carry, row):
        return carry + row.sum(), (row, 2 * row)

    # Numbers of both signs all but cancel: beside a larger one, their rounding stays small.
    start = jnp.full_like(x[0, 0], w.size / 4)
    total, (same, doubled) = jax.lax.scan(step, start, w)
    return {"total": total, "same": contracted(x, same), "doubled": contracted(x, doubled)}


@op()
def carried_by_a_loop(w, v, x):
    def step(_, state):
        kernel, other, y = state
        return kernel, other, y * 0.5 + contracted(x, kernel) - contracted(x, other)

    start = w, v, contracted(x, v) * 0
    kernel, _, y = jax.lax.fori_loop(0, 3, step, start)
    return {"result": y, "the weight": contracted(x, kernel)}


@op()
def swapped_by_a_loop(w, v, x):
    def step(state, _):
        first, second, y = state
        return (second, first, y * 0.5 + contracted(x, first)), None

    return {"result": jax.lax.scan(step, (w, v, contracted(x, w)), None, length=3)[0][2]}


@op()
def changed_by_a_loop(w, v, x):
    def step(state, _):
        kernel, y = state
        return (kernel * 0.5, y + contracted(x, kernel)), None

    return {"result": jax.lax.scan(step, (w, contracted(x, w)), None, length=2)[0][1]}


@op()
def layers_by_number(w, v, x):
    count = w.shape[0]

    def step(i, y):
        return y * 0.5 + contracted(x, w[i]) + contracted(x, w[i - count]) - contracted(x, v[-i])

    return {"result": jax.lax.fori_loop(0, count, step, contracted(x, w[0]))}


@op(explicit=False, reverse=False)
def while_loop(w, v, x):
    def step(state):
        i, kernel, y = state
        return i + 1, kernel, y * 0.5 + contracted(x, kernel) + contracted(x, v)

    def goes_on(state):
        return (state[0] < 3) & (jnp.vdot(v, v) > 0)

    return {"result": jax.lax.while_loop(goes_on, step, (0, w, contracted(x, w)))[2]}


@op()
def conditional(w, v, x):
    return {
        "two": jax.lax.cond(
            x[0, 0] > 0, lambda w, v: contracted(x, w), lambda w, v: contracted(x, v) * 2, w, v
        ),
        "weights": contracted(x, jax.lax.cond(x[0, 1] > 0, lambda: w, lambda: v)),
        "three": jax.lax.switch(
            jnp.argmax(x[0, :3]),
            [lambda: contracted(x, w), lambda: contracted(x, v), lambda: contracted(x, w + v)],
        ),
    }
