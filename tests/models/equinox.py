"""Models made of Equinox's own modules: the parameters are the module, functions and all."""

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.models.linen import noise, tokens
from tests.models.model import Call, model, prefixed

_KEYS = jax.random.split(jax.random.key(3), 8)


@model(
    linear={"layers/0/weight": "oi", "layers/1/weight": "oi"},
    also={"layers/2/weight": "oi"},
)
def equinox_mlp() -> Call:
    mlp = eqx.nn.MLP(24, 24, 32, 2, key=_KEYS[0])
    return Call(lambda mlp, x: jax.vmap(mlp)(x), mlp, (noise(6, 24),))


_ATTENTION = {f"{name}_proj/weight": "oi" for name in ("query", "key", "value")}


@model(linear=_ATTENTION, also={"output_proj/weight": "oi"})
def equinox_attention() -> Call:
    attention = eqx.nn.MultiheadAttention(4, 24, use_query_bias=True, key=_KEYS[0])
    return Call(lambda module, x: module(x, x, x), attention, (noise(7, 24),))


@model(
    linear={"layers/0/weight": "oiii", "layers/2/weight": "oiii"},
    also={"layers/5/weight": "oi"},
)
def equinox_convolutions() -> Call:
    """A convolution's bias has three axes here."""
    module = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(8, 16, 3, padding=1, key=_KEYS[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.ConvTranspose2d(16, 24, 2, stride=2, key=_KEYS[1]),
            eqx.nn.AdaptiveAvgPool2d(1),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(24, 24, key=_KEYS[2]),
        ]
    )
    return Call(lambda module, x: jax.vmap(module)(x), module, (noise(2, 8, 6, 6),))


@model(linear={"weight_ih": "oi", "weight_hh": "oi"})
def equinox_gru_over_time() -> Call:
    def fn(cell, xs):
        return jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(24, xs.dtype), xs)[0]

    return Call(fn, eqx.nn.GRUCell(20, 24, key=_KEYS[0]), (noise(6, 20),))


@model(linear={"weight_ih": "oi", "weight_hh": "oi"})
def equinox_lstm_over_time() -> Call:
    def fn(cell, xs):
        state = (jnp.zeros(24, xs.dtype), jnp.zeros(24, xs.dtype))
        return jax.lax.scan(lambda state, x: (cell(x, state), None), state, xs)[0]

    return Call(fn, eqx.nn.LSTMCell(20, 24, key=_KEYS[0]), (noise(6, 20),))


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        attention_key, mlp_key = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(4, 24, key=attention_key)
        self.norm = eqx.nn.LayerNorm(24)
        self.mlp = eqx.nn.MLP(24, 24, 48, 1, jax.nn.gelu, key=mlp_key)

    def __call__(self, x):
        normalised = jax.vmap(self.norm)(x)
        x = x + self.attention(normalised, normalised, normalised)
        return x + jax.vmap(self.mlp)(x)


class LanguageModel(eqx.Module):
    """Blocks stacked by `filter_vmap` and scanned, between an embedding and its transpose."""

    embedding: eqx.nn.Embedding
    blocks: Block

    def __init__(self):
        self.embedding = eqx.nn.Embedding(60, 24, key=_KEYS[0])
        self.blocks = eqx.filter_vmap(Block)(_KEYS[1:4])

    def __call__(self, ids):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def body(x, block):
            return eqx.combine(block, static)(x), None

        x, _ = jax.lax.scan(jax.checkpoint(body), jax.vmap(self.embedding)(ids), arrays)
        return x @ self.embedding.weight.T


@model(
    linear={
        **prefixed(
            "blocks/attention",
            {f"{name}_proj/weight": "boi" for name in ("query", "key", "value", "output")},
        ),
        "blocks/mlp/layers/0/weight": "boi",
        "blocks/mlp/layers/1/weight": "boi",
    },
    also={"embedding/weight": "io"},
)
def equinox_scanned_language_model() -> Call:
    ids = tokens(2, 7, vocabulary=60)
    return Call(lambda module, ids: jax.vmap(module)(ids), LanguageModel(), (ids,))
