"""Functions, loops and branches around a weight, with the weight in each of their places."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from tests.cases.case import case


@jax.jit
def _jitted_layer(kernel, x):
    return jnp.tanh(x @ kernel)


@case({"W": (24, 24)}, (5, 24))
def jitted_inside(params, x):
    return jax.jit(lambda w, h: _jitted_layer(w, _jitted_layer(w, h)))(params["W"], x)


@case({"W": (24, 24)}, (5, 24))
def transposed_inside_a_jitted_function(params, x):
    return x @ jax.jit(jnp.transpose)(params["W"])


@case({"W": (24, 24)}, (4, 24))
def scan_with_a_constant(params, x):
    final, steps = jax.lax.scan(
        lambda h, x_t: ((new := jnp.tanh((h + x_t) @ params["W"])), new[:3]),
        jnp.zeros_like(x[0]),
        x,
    )
    return final + steps.sum()


@case({"W": (3, 24, 24), "b": (3, 24)}, (5, 24), axes={"W": ("batch", "in", "out")})
def scan_over_a_stack(params, x):
    return jax.lax.scan(
        lambda h, layer: (jnp.tanh(h @ layer["W"] + layer["b"]), None), x, params, reverse=True
    )[0]


@case(
    {"W": (3, 24, 24)},
    (64, 24),
    axes={"W": ("batch", "in", "out")},
    how=frozenset({"merged"}),
)
def scan_over_a_stack_with_many_rows(params, x):
    return jax.lax.scan(lambda h, kernel: (jnp.tanh(h @ kernel), None), x, params["W"])[0]


@case({"W": (3, 24, 24)}, (5, 24), axes={"W": ("batch", "in", "out")})
def scan_over_remat_of_a_stack(params, x):
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def layer(h, kernel):
        return jnp.tanh(h @ kernel), None

    return jax.lax.scan(layer, x, params["W"], unroll=2)[0]


@case({"W": (24, 24)}, (5, 24), reverse=False)
def while_loop_that_hands_the_weight_on(params, x):
    def step(state):
        count, kernel, h = state
        return count + 1, kernel, jnp.tanh(h @ kernel)

    return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, params["W"], x))[2]


@case({"W": (24, 24)}, (5, 24))
def scan_that_hands_the_weight_on(params, x):
    return jax.lax.fori_loop(0, 3, lambda _, s: (s[0], jnp.tanh(s[1] @ s[0])), (params["W"], x))[1]


@case({"W": (3, 24, 24)}, (5, 24), axes={"W": ("batch", "in", "out")})
def scan_that_returns_its_weights(params, x):
    def layer(h, kernel):
        kernel, h = jax.checkpoint(lambda w, h: (w, jnp.tanh(h @ w)))(kernel, h)
        return h, kernel

    h, kernels = jax.lax.scan(layer, x, params["W"])
    return h @ kernels[0]


@case({"W": (24, 24)}, (5, 24))
def cond(params, x):
    return jax.lax.cond(
        x.sum() > 0, lambda w, h: h @ w, lambda w, h: jnp.sin(h @ w.T), params["W"], x
    )


@case({"W1": (24, 20), "W2": (24, 20)}, (5, 24))
def switch(params, x):
    branches = [lambda h: h @ params["W1"], lambda h: h @ params["W2"], lambda h: 2 * h[:, :20]]
    return jax.lax.switch(jnp.argmax(x[0, :3]), branches, x)


@case({"W": (24, 24)}, (5, 24))
def remat(params, x):
    return jax.checkpoint(lambda w, h: jnp.tanh(h @ w))(params["W"], x)


@case({"W": (24, 24)}, (5, 24))
def remat_that_saves_nothing_by_name(params, x):
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    def layer(w, h):
        return checkpoint_name(jnp.tanh(h @ w), "hidden") @ w

    return jax.checkpoint(layer, policy=policy)(params["W"], x)


@jax.custom_jvp
def _layer_with_jvp(kernel, x):
    return jnp.tanh(x @ kernel)


@_layer_with_jvp.defjvp
def _(primals, tangents):
    (kernel, x), (kernel_dot, x_dot) = primals, tangents
    y = jnp.tanh(x @ kernel)
    return y, (1 - y**2) * (x_dot @ kernel + x @ kernel_dot)


@case({"W": (24, 20)}, (5, 24))
def custom_jvp(params, x):
    return _layer_with_jvp(params["W"], x)


@jax.custom_vjp
def _layer_with_vjp(kernel, x, steps):
    return jnp.tanh(x @ kernel) * steps


def _forward(kernel, x, steps):
    y = jnp.tanh(x @ kernel)
    return y * steps, (kernel, x, y, steps)


def _backward(saved, cotangent):
    kernel, x, y, steps = saved
    inner = cotangent * steps * (1 - y**2)
    return x.T @ inner, inner @ kernel.T, None


_layer_with_vjp.defvjp(_forward, _backward)


@case({"W": (24, 20)}, (5, 24))
def custom_vjp(params, x):
    return _layer_with_vjp(params["W"], x, jnp.asarray(2, jnp.int32).astype(x.dtype))


@case({"W": (24, 20)}, (6, 24))
def shard_map(params, x):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))

    def shard(kernel, x):
        return jax.lax.psum(x @ kernel, "model")

    split = PartitionSpec("model", None), PartitionSpec(None, "model")
    return jax.shard_map(shard, mesh=mesh, in_specs=split, out_specs=PartitionSpec())(
        params["W"], x
    )
