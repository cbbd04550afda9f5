"""Models made of Haiku's own modules."""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from tests.models.linen import noise, tokens
from tests.models.model import Call, drawn, fresh, model


def called(forward: Callable[..., Any], *args: Any) -> Call:
    """Returns the call `fn(params, state, *args)` of a function of Haiku modules."""
    transformed = hk.transform_with_state(forward)
    key = jax.random.key(3)
    params = drawn(lambda *args: transformed.init(key, *args)[0], *args)
    state = fresh(lambda *args: transformed.init(key, *args)[1], *args)

    def fn(params: Any, state: Any, *args: Any) -> Any:
        return transformed.apply(params, state, jax.random.key(9), *args)

    return Call(fn, params, (state, *args))


@model(
    linear={"mlp/~/linear_0/w": "io", "mlp/~/linear_1/w": "io"},
    also={"mlp/~/linear_2/w": "io"},
)
def haiku_mlp() -> Call:
    def forward(x):
        return hk.nets.MLP((32, 28, 24))(x)

    return called(forward, noise(6, 24))


@model(
    linear={
        "attention/query/w": "io",
        "attention/key/w": "io",
        "attention/value/w": "io",
        "attention/linear/w": "io",
    },
    also={"head/w": "io"},
)
def haiku_attention() -> Call:
    def forward(x):
        attention = hk.MultiHeadAttention(
            4, key_size=6, w_init=hk.initializers.VarianceScaling(), name="attention"
        )
        normalised = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x = x + attention(normalised, normalised, normalised)
        return hk.Linear(24, name="head")(x)

    return called(forward, noise(2, 7, 24))


@model(
    linear={"conv2_d/w": "iiio", "conv2_d_1/w": "iiio"},
    also={"linear/w": "io"},
    promotion="standard",  # the moving average raises a float to the power of its integer counter
)
def haiku_convolutions_with_batch_norm() -> Call:
    def forward(x):
        x = jax.nn.relu(hk.Conv2D(16, 3)(x))
        x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(24, 3, stride=2)(x), is_training=True)
        return hk.Linear(24)(jax.nn.relu(x).mean((1, 2)))

    return called(forward, noise(2, 8, 8, 8))


@model(
    linear={"lstm/linear/w": "io"},
    also={"embed/embeddings": "io", "head/w": "io"},
)
def haiku_lstm_over_time() -> Call:
    def forward(ids):
        xs = hk.Embed(60, 20, name="embed")(ids)
        core = hk.LSTM(24)
        ys, state = hk.dynamic_unroll(core, xs, core.initial_state(2))
        return hk.Linear(24, name="head")(ys), state

    return called(forward, tokens(6, 2, vocabulary=60))


@model(
    linear={"gru/w_i": "io", "gru/w_h": "io"},
)
def haiku_gru_over_time() -> Call:
    def forward(xs):
        core = hk.GRU(24)
        return hk.dynamic_unroll(core, xs, core.initial_state(2))

    return called(forward, noise(6, 2, 20))


@model(
    linear={
        "__layer_stack_no_per_layer/linear/w": "bio",
        "__layer_stack_no_per_layer/linear_1/w": "bio",
    },
)
def haiku_layer_stack() -> Call:
    def block(x):
        normalised = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        return x + hk.Linear(24)(jnp.tanh(hk.Linear(32)(normalised)))

    def forward(x):
        return hk.layer_stack(3)(block)(x)

    return called(forward, noise(5, 24))
