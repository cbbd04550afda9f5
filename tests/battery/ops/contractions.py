"""Products of activations and weights, and of weights with each other and with themselves."""

import itertools

import jax
import jax.numpy as jnp

from tests.battery.registry import IS_STRICT, op, rows

_LETTERS = "abc"


def _letters(w):
    return _LETTERS[: w.ndim]


@op()
def activations_on_the_left(w, v, x):
    return {
        f"axis {axis}": jnp.tensordot(rows(x, size), w, (1, axis))
        for axis, size in enumerate(w.shape)
    }


@op()
def activations_on_the_right(w, v, x):
    return {
        f"axis {axis}": jnp.tensordot(w, rows(x, size), (axis, 1))
        for axis, size in enumerate(w.shape)
    }


@op()
def several_axes(w, v, x):
    return {
        f"axes {axes}": jnp.tensordot(
            rows(x, *(w.shape[axis] for axis in axes)), w, (tuple(range(1, len(axes) + 1)), axes)
        )
        for count in range(2, w.ndim + 1)
        for axes in itertools.combinations(range(w.ndim), count)
    }


@op()
def no_axis(w, v, x):
    return {"outer": jnp.tensordot(x[:, 0], w, 0), "outer, right": jnp.tensordot(w, x[:, 0], 0)}


@op(explicit=not IS_STRICT)
def batched(w, v, x):
    """One axis is mapped over, another summed over."""
    letters = _letters(w)
    results = {}
    for mapped, summed in itertools.permutations(range(w.ndim), 2):
        pair = letters[mapped] + letters[summed]
        rest = letters.replace(letters[summed], "")
        activations = rows(x, w.shape[mapped], w.shape[summed])
        results[f"{mapped} mapped, {summed} summed"] = jnp.einsum(
            f"n{pair},{letters}->n{rest}", activations, w
        )
    return results


@op(explicit=not IS_STRICT)
def batched_weight_first(w, v, x):
    letters = _letters(w)
    return {
        f"{axis} mapped": jnp.einsum(
            f"{letters},n{letters[axis]}->{letters[axis]}n", w, rows(x, w.shape[axis])
        )
        for axis in range(w.ndim)
    }


@op()
def options_of_a_product(w, v, x):
    return {
        "precision": jnp.tensordot(x[:, : w.shape[0]], w, (1, 0), precision="highest"),
        "preferred": jax.lax.dot_general(
            x[:, : w.shape[0]], w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        ),
    }


@op()
def vmapped_products(w, v, x):
    return {
        f"axis {axis}": jax.vmap(
            lambda each: jnp.tensordot(x[:, : each.shape[0]], each, (1, 0)), axis
        )(w)
        for axis in range(w.ndim)
    }


@op(explicit=False)
def products_of_two_weights(w, v, x):
    letters = _letters(w)
    contractions = {f"axis {axis}": jnp.tensordot(w, v, (axis, axis))[0] for axis in range(w.ndim)}
    batch = jnp.einsum(f"{letters},{letters}->a", w, v)
    gram = jnp.tensordot(w, v, (tuple(range(1, w.ndim)),) * 2)
    return contractions | {
        "batch": batch,
        "to a scalar": jnp.vdot(w, v),
        "x": x[:, : len(w)] @ gram,
    }


@op(explicit=False)
def products_with_itself(w, v, x):
    """The same variable is both operands of one equation."""
    letters = _letters(w)
    contractions = {f"axis {axis}": jnp.tensordot(w, w, (axis, axis))[0] for axis in range(w.ndim)}
    mapped = {
        f"{letter} mapped": jnp.einsum(f"{letters},{letters}->{letter}", w, w) for letter in letters
    }
    return contractions | mapped | {"to a scalar": jnp.vdot(w, w)}


@op(explicit=False)
def gram_matrix(w, v, x):
    others = tuple(range(1, w.ndim))
    gram = jnp.tensordot(w, w, (others, others))
    both = jnp.tensordot(w, jnp.tensordot(v, w, (others, others)), (0, 0))
    return {
        "left": x[:, : w.shape[0]] @ gram,
        "right": gram @ rows(x, w.shape[0]).T,
        "three": jnp.tensordot(both, rows(x, v.shape[0]), (w.ndim - 1, 1)),
    }


@op(ndims=(3,), batchable=False, explicit=False, symbolic=False)
def ragged(w, v, x):
    """Rows in groups, each times its expert."""
    activations = x[:2, : 5 * w.shape[1]].reshape(10, w.shape[1])
    sizes = jnp.array([4, 0, 5, 1], jnp.int32)
    return {"rows": jax.lax.ragged_dot(activations, w, sizes)}


@op(ndims=(3,), batchable=False, explicit=False, symbolic=False)
def ragged_over_a_transposed_weight(w, v, x):
    experts = jnp.moveaxis(w, 2, 0)
    activations = x[:2, : 5 * w.shape[0]].reshape(10, w.shape[0])
    sizes = jnp.array([1, 0, 2, 3, 0, 1, 1, 1], jnp.int32)
    return {"rows": jax.lax.ragged_dot(activations, experts, sizes)}


def _convolved(x, kernel, spec, **options):
    size = dict(zip(spec, kernel.shape, strict=True))
    inputs = size["I"] * options.get("feature_group_count", 1)
    steps = 192 // inputs if inputs * 8 > 192 else 8
    strides = options.pop("strides", (1,))
    padding = options.pop("padding", "SAME")
    return jax.lax.conv_general_dilated(
        rows(x, steps, inputs),
        kernel,
        strides,
        padding,
        dimension_numbers=("NWC", spec, "NWC"),
        **options,
    )


def _kernel(w):
    return w if w.ndim == 3 else w[None]


@op(explicit=False)
def convolved(w, v, x):
    return {
        spec: _convolved(x, _kernel(w), spec) for spec in ("WIO", "WOI", "IWO", "OIW", "OWI", "IOW")
    }


@op(explicit=False)
def convolved_with_options(w, v, x):
    kernel = _kernel(w)
    return {
        "strided": _convolved(
            x, kernel, "WIO", strides=(2,), padding="VALID" if w.ndim == 2 else "SAME"
        ),
        "dilated": _convolved(
            x, kernel, "WIO", padding=((2, 7),), lhs_dilation=(2,), rhs_dilation=(2,)
        ),
        "grouped": _convolved(x, kernel, "WIO", feature_group_count=2),
        "transposed": jax.lax.conv_transpose(
            rows(x, 5, kernel.shape[1]),
            kernel,
            (2,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        ),
    }


@op(explicit=False)
def convolved_depthwise(w, v, x):
    kernel = _kernel(w).reshape(-1, 1, w.shape[-1])[:3]
    return {"depthwise": _convolved(x, kernel, "WIO", feature_group_count=w.shape[-1])}
