"""What a model does to a weight beside multiplying with it: lookups, structure, functions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from tests.cases.case import case


@case({"W": (30, 16)}, (5,), integer_x=True)
def embedding(params, ids):
    return jnp.tanh(jnp.take(params["W"], ids, axis=0))


@case({"W": (30, 16)}, (5,), integer_x=True)
def embedding_indexed(params, ids):
    return params["W"][ids]


@case({"W": (30, 16)}, (5,), integer_x=True)
def embedding_of_each_by_vmap(params, ids):
    return jax.vmap(lambda i: params["W"][i])(ids)


@case({"W": (30, 16)}, (5,), integer_x=True)
def tied_embedding(params, ids):
    return jnp.tanh(params["W"][ids]) @ params["W"].T


@case({"W": (30, 16)}, (5,), integer_x=True)
def embedding_one_hot(params, ids):
    return jax.nn.one_hot(ids, 30, dtype=params["W"].dtype) @ params["W"]


@case(
    {"W": (4, 24, 20), "V": (4, 24)},
    (4,),
    integer_x=True,
    axes={"W": ("batch", "in", "out")},
)
def expert_of_each_token(params, ids):
    return jnp.einsum("ti,tio->to", params["V"][ids], params["W"][ids])


@case({"W": (3, 24, 20)}, (10, 24), axes={"W": ("batch", "in", "out")}, batchable=False)
def ragged_dot(params, x):
    return jax.lax.ragged_dot(x, params["W"], jnp.array([4, 0, 6], jnp.int32))


@case({"W": (24, 20)}, (5, 24))
def reshaped(params, x):
    kernel = params["W"].reshape(4, 6, 2, 10).reshape(24, 1, 20)
    return jnp.einsum("ti,iuo->tuo", x, kernel)


@case({"W": (24, 4, 6)}, (5, 24), axes={"W": ("in", "out", "out")})
def reshaped_to_a_matrix(params, x):
    return x @ params["W"].reshape(24, 24)


@case({"W": (24, 20)}, (5, 24))
def squeezed_and_expanded(params, x):
    return x @ jnp.squeeze(jnp.expand_dims(params["W"], (0, 2)), (0, 2))


@case({"W": (24, 20)}, (3, 5, 24))
def broadcast_over_a_batch(params, x):
    return jnp.matmul(x, jnp.broadcast_to(params["W"], (3, 24, 20)))


@case({"W": (24, 20)}, (5, 20))
def sliced(params, x):
    return x @ params["W"][2:22, 1::2]


@case({"W": (3, 24, 20)}, (5, 24), axes={"W": ("batch", "in", "out")})
def layer_of_a_stack(params, x):
    return x @ params["W"][1]


@case({"W": (3, 24, 24)}, (5, 24), axes={"W": ("batch", "in", "out")})
def layers_by_traced_index(params, x):
    return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params["W"][i]), x)


@case({"W": (24, 60)}, (5, 24))
def split_into_three(params, x):
    query, key, value = jnp.split(params["W"], 3, axis=1)
    return (x @ query) * (x @ key) + x @ value


@case({"W1": (24, 20), "W2": (24, 16), "V": (24, 4)}, (5, 24))
def concatenated_outputs(params, x):
    return x @ jnp.concatenate([params["W1"], params["V"], params["W2"]], axis=1)


@case({"W1": (12, 20), "W2": (14, 20)}, (5, 26))
def concatenated_inputs(params, x):
    return x @ jnp.concatenate([params["W1"], params["W2"]], axis=0)


@case({"W1": (24, 20), "W2": (24, 16)}, (5, 24))
def concatenated_then_sliced_and_transposed(params, x):
    kernel = jnp.concatenate([params["W1"], params["W2"]], axis=1)
    return x @ kernel.T.T[:, 5:30]


@case({"W1": (24, 20), "W2": (24, 20)}, (2, 5, 24))
def stacked_on_the_fly(params, x):
    return jnp.einsum("eti,eio->eto", x, jnp.stack([params["W1"], params["W2"]]))


@case({"W": (24, 20)}, (5, 24), exact_when_compiled=False)
def scaled_negated_copied(params, x):
    kernel = jax.lax.optimization_barrier(-(2.0 * params["W"]) / jnp.sqrt(x[0, 0] ** 2 + 1))
    return x @ jnp.copy(kernel)


@case({"W": (24, 20), "g": (20,), "h": (24, 1)}, (5, 24))
def scaled_along_each_side(params, x):
    return x @ (params["W"] * params["g"] / (params["h"] ** 2 + 1))


@case({"W": (24, 20)}, (5, 24))
def reversed_axes(params, x):
    return x @ params["W"][::-1, ::-1]


@case({"W1": (24, 20), "W2": (24, 20), "V": (24, 20)}, (5, 24))
def sums_of_weights(params, x):
    return x @ (params["W1"] - params["W2"] + params["V"] - 1.0)


@case({"W": (24, 20)}, (5, 24))
def sharding_constraint(params, x):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, PartitionSpec(None, "model"))
    return x @ jax.lax.with_sharding_constraint(params["W"], sharding)


_MATERIALIZED = frozenset({"materialized"})


@case({"W": (24, 20)}, (5, 24), how=_MATERIALIZED)
def elementwise_function_of_the_weight(params, x):
    return x @ jnp.sin(params["W"])


@case({"W": (24, 20)}, (5, 24), how=_MATERIALIZED)
def axes_of_both_sides_merged(params, x):
    return (x[:, :, None] * params["W"].reshape(-1).reshape(24, 20)).sum(1)


@case({"W": (24, 20)}, (5, 24), how=_MATERIALIZED, reverse=False)
def pure_callback(params, x):
    kernel = params["W"]
    shape = jax.ShapeDtypeStruct((5, 20), x.dtype)
    return jax.pure_callback(
        lambda w, x: np.asarray(x) @ np.asarray(w), shape, kernel, x, vmap_method="sequential"
    )


@case({"W": (24, 24)}, (5, 24), how=frozenset({"factored", "materialized"}))
def loop_that_changes_the_weight(params, x):
    def step(state, _):
        kernel, h = state
        return (jnp.tanh(kernel), h @ kernel), None

    return jax.lax.scan(step, (params["W"], x @ params["W"]), None, length=2)[0][1]
