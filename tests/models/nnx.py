"""Models made of Flax NNX's own modules, in functional style."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from tests.models.linen import noise, tokens
from tests.models.model import Call, model, prefixed


def called(module: nnx.Module, *args: Any) -> Call:
    """Returns the call `fn(params, rest, *args)` of a module, with its new state as an output."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def fn(params: Any, rest: Any, *args: Any) -> Any:
        module = nnx.merge(graphdef, params, rest, copy=True)
        y = module(*args)
        return y, nnx.state(module, (nnx.BatchStat, nnx.Cache))

    return Call(fn, params, (rest, *args))


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.layer1 = nnx.Linear(24, 32, rngs=rngs)
        self.layer2 = nnx.Linear(32, 28, rngs=rngs)
        self.head = nnx.Linear(28, 24, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.layer2(nnx.relu(self.layer1(x)))))


@model(linear={"layer1/kernel": "io", "layer2/kernel": "io"}, also={"head/kernel": "io"})
def nnx_mlp() -> Call:
    return called(MLP(nnx.Rngs(3)), noise(6, 24))


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.up = nnx.ConvTranspose(16, 24, (2, 2), (2, 2), rngs=rngs)
        self.head = nnx.LinearGeneral((24,), (4, 6), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(nnx.relu(self.up(x)).mean((1, 2)))


@model(
    linear={"conv/kernel": "iiio", "up/kernel": "iiio"},
    also={"head/kernel": "ioo"},
)
def nnx_convolutions_with_batch_norm() -> Call:
    return called(CNN(nnx.Rngs(3)), noise(2, 6, 6, 8))


class Block(nnx.Module):
    def __init__(self, rngs, decode=False):
        self.norm1 = nnx.LayerNorm(24, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 24, decode=decode, rngs=rngs)
        self.norm2 = nnx.LayerNorm(24, rngs=rngs)
        self.up = nnx.Linear(24, 48, rngs=rngs)
        self.down = nnx.Linear(48, 24, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


_BLOCK = {
    **{f"attention/{name}/kernel": "ioo" for name in ("query", "key", "value")},
    "attention/out/kernel": "iio",
    "up/kernel": "io",
    "down/kernel": "io",
}


@model(linear=_BLOCK)
def nnx_encoder_block() -> Call:
    return called(Block(nnx.Rngs(3)), noise(2, 7, 24))


@model(linear=_BLOCK)
def nnx_decoder_with_cache() -> Call:
    block = Block(nnx.Rngs(3), decode=True)
    block.attention.init_cache((2, 5, 24))
    return called(block, noise(2, 1, 24))


class ScannedLanguageModel(nnx.Module):
    """Blocks stacked by `nnx.vmap` and scanned with remat, and a tied head."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def blocks(rngs):
            return Block(rngs)

        self.embed = nnx.Embed(60, 24, rngs=rngs)
        self.blocks = blocks(rngs)

    def __call__(self, ids):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x, block):
            return block(x)

        return self.embed.attend(forward(self.embed(ids), self.blocks))


@model(
    linear={f"blocks/{path}": f"b{letters}" for path, letters in _BLOCK.items()},
    also={"embed/embedding": "io"},
    float32_because="an embedding keeps the dtype that it was made with",
)
def nnx_scanned_language_model() -> Call:
    return called(ScannedLanguageModel(nnx.Rngs(3)), tokens(2, 7, vocabulary=60))


class Experts(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=4)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def experts(rngs):
            return nnx.Linear(24, 32, rngs=rngs)

        self.experts = experts(rngs)
        self.router = nnx.Linear(24, 4, rngs=rngs)
        self.head = nnx.Linear(32, 24, rngs=rngs)

    def __call__(self, x):
        @nnx.vmap(in_axes=(0, None), out_axes=-2)
        def each(expert, x):
            return nnx.gelu(expert(x))

        gates = nnx.softmax(self.router(x))
        return self.head(jnp.einsum("...e,...ed->...d", gates, each(self.experts, x)))


@model(
    linear={"experts/kernel": "oio", "router/kernel": "io"},
    also={"head/kernel": "io"},
)
def nnx_experts() -> Call:
    return called(Experts(nnx.Rngs(3)), noise(2, 5, 24))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(20, 24, rngs=rngs), rngs=rngs)

    def __call__(self, x, carry):
        return self.rnn(x, initial_carry=carry)


@model(
    linear=prefixed("rnn/cell", {"dense_i/kernel": "io", "dense_h/kernel": "io"}),
)
def nnx_lstm_over_time() -> Call:
    carry = (jnp.zeros((2, 24)), jnp.zeros((2, 24)))
    return called(Recurrent(nnx.Rngs(3)), noise(2, 6, 20), carry)
