"""Functions within the model: jitted, rematerialised, with derivatives of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tests.battery.registry import contracted, op


@jax.jit
def _layer(w, x):
    return contracted(x, w)


@jax.jit
def _two_layers(w, v, x):
    return _layer(w, x) + 2 * _layer(v, x)


@op()
def jitted(w, v, x):
    return {
        "one": _layer(w, x),
        "nested": _two_layers(w, v, x),
        "other order": _two_layers(v, w, x),
        "same": _two_layers(w, w, x),
        "transposed": contracted(x, jax.jit(jnp.transpose)(w)),
        "inlined": jax.jit(contracted, inline=True)(x, w),
    }


@op(linear=False)
def rematerialised(w, v, x):
    policies = jax.checkpoint_policies
    layer = functools.partial(contracted, x)

    def named(w):
        return jnp.sin(checkpoint_name(layer(w), "hidden"))

    return {
        "plain": jax.checkpoint(lambda w: jnp.sin(layer(w)))(w),
        "dots": jax.checkpoint(lambda w, v: layer(w) * layer(v), policy=policies.dots_saveable)(
            w, v
        ),
        "names": jax.checkpoint(named, policy=policies.save_only_these_names("hidden"))(w),
        "all": jax.checkpoint(layer, policy=policies.everything_saveable, prevent_cse=False)(w),
        "weight": contracted(x, jax.checkpoint(lambda w: w * 2)(w)),
    }


@op()
def rematerialised_layers(w, v, x):
    layer = jax.checkpoint(lambda w, v: contracted(x, w) * contracted(x, v))
    return {"layers": jax.lax.map(lambda pair: layer(*pair), (w, v))}


@op(linear=False)
def gradients_within(w, v, x):
    """Derivatives that the model itself takes."""

    def energy(x):
        return jnp.sum(contracted(x, w) ** 2)

    remat = jax.checkpoint(lambda x: jnp.sum(contracted(x, w) * contracted(x, v)))
    value, pullback = jax.vjp(lambda x: contracted(x, w), x)
    return {
        "grad": jax.grad(energy)(x)[:, :4],
        "grad of remat": jax.grad(remat)(x)[:, :4],
        "vjp": pullback(value)[0][:, :4],
        "jvp": jax.jvp(energy, (x,), (x + 1,))[1],
        "by weight": contracted(x, jax.grad(lambda w: jnp.sum(contracted(x, w) ** 2))(w)),
    }


@jax.custom_jvp
def _with_jvp(w, x):
    return jnp.sin(contracted(x, w))


@_with_jvp.defjvp
def _(primals, tangents):
    (w, x), (w_dot, x_dot) = primals, tangents
    y = contracted(x, w)
    return jnp.sin(y), jnp.cos(y) * (contracted(x_dot, w) + contracted(x, w_dot))


@op()
def custom_jvp(w, v, x):
    return {"w": _with_jvp(w, x), "v": _with_jvp(v, x), "transposed": _with_jvp(w.T, x)}


@jax.custom_vjp
def _with_vjp(w, x):
    return contracted(x, w) * 2


def _forward(w, x):
    return contracted(x, w) * 2, (w, x)


def _backward(saved, cotangent):
    w, x = saved
    _, pullback = jax.vjp(lambda w, x: contracted(x, w) * 2, w, x)
    return pullback(cotangent)


_with_vjp.defvjp(_forward, _backward)


@op(forward=False)
def custom_vjp(w, v, x):
    return {"w": _with_vjp(w, x), "v": _with_vjp(v, x), "transposed": _with_vjp(w.T, x)}


@jax.custom_vjp
def _with_static_inputs(w, x, count, factor, flag):
    return contracted(x, w) * jnp.asarray(factor, x.dtype)


def _static_forward(w, x, count, factor, flag):
    return _with_static_inputs(w, x, count, factor, flag), (w, x, factor)


def _static_backward(saved, cotangent):
    w, x, factor = saved
    scaled = cotangent * jnp.asarray(factor, x.dtype)
    w_bar, x_bar = jax.vjp(lambda w, x: contracted(x, w), w, x)[1](scaled)
    return w_bar, x_bar, None, None, None


_with_static_inputs.defvjp(_static_forward, _static_backward)


@op(forward=False)
def custom_vjp_of_other_types(w, v, x):
    ids = jnp.arange(3)
    return {
        "Python numbers": _with_static_inputs(w, x, 1, 0.5, True),
        "arrays": _with_static_inputs(w, x, ids, jnp.ones(()), ids > 1),
        "NumPy": _with_static_inputs(w, x, np.int32(2), np.float32(2), np.bool_(False)),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _nothing_perturbed(w, x, perturbed):
    return contracted(x, w)


def _checking_forward(w, x, perturbed):
    # As Equinox does: what a function is told of its inputs, it relies on.
    assert (w.perturbed, x.perturbed) == perturbed, (w.perturbed, x.perturbed)
    return contracted(x.value, w.value), (w.value, x.value)


def _checking_backward(perturbed, saved, cotangent):
    w, x = saved
    return jax.vjp(lambda w, x: contracted(x, w), w, x)[1](cotangent)


_nothing_perturbed.defvjp(_checking_forward, _checking_backward, symbolic_zeros=True)


@op(forward=False, batchable=False)
def custom_vjp_that_asks_what_is_perturbed(w, v, x):
    return {"weight alone": _nothing_perturbed(w, x, (True, False))}


@jax.custom_batching.custom_vmap
def _with_vmap(w, x):
    return contracted(x, w)


@_with_vmap.def_vmap
def _(axis_size, in_batched, w, x):
    axes = tuple(0 if batched else None for batched in in_batched)
    return jax.vmap(lambda w, x: contracted(x, w), axes)(w, x), True


@op(reverse=False, forward=False)
def custom_vmap(w, v, x):
    return {"w": _with_vmap(w, x)}


@op(symbolic=False, reverse=False, forward=False)
def callback(w, v, x):
    def on_host(w, x):
        return np.tensordot(np.asarray(x)[:, : w.shape[0]], np.asarray(w), 1)

    shape = jax.ShapeDtypeStruct((x.shape[0], *w.shape[1:]), x.dtype)
    return {"host": jax.pure_callback(on_host, shape, w, x, vmap_method="sequential")}


@op()
def platform_dependent(w, v, x):
    return {
        "chosen": jax.lax.platform_dependent(
            w, cpu=lambda w: contracted(x, w), default=lambda w: contracted(x, w) * 2
        )
    }


@op()
def vmapped_within(w, v, x):
    return {
        "axis 0": jax.vmap(lambda w, v: _two_layers(w, v, x))(w, v),
        "last": jax.vmap(lambda w: _layer(w, x), in_axes=-1, out_axes=-1)(w),
    }
