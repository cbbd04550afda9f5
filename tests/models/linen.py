"""Models made of Flax Linen's own modules."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.models.model import Call, drawn, fresh, model, prefixed

_KEY = jax.random.key(3)


def called(
    module: nn.Module,
    *args: Any,
    mutable: Sequence[str] = (),
    rngs: dict[str, jax.Array] | None = None,
    init_args: tuple[Any, ...] | None = None,
    **options: Any,
) -> Call:
    """Returns the call `fn(params, state, *args)` of a module, initialised at random."""

    def init(*args: Any) -> tuple[Any, Any]:
        variables = module.init({"params": _KEY, **(rngs or {})}, *args, **options)
        return variables.pop("params"), variables

    given = args if init_args is None else init_args
    params = drawn(lambda *args: init(*args)[0], *given)
    state = fresh(lambda *args: init(*args)[1], *given)

    def fn(params: Any, state: Any, *args: Any) -> Any:
        return module.apply(
            {"params": params, **state}, *args, rngs=rngs, mutable=list(mutable) or False, **options
        )

    return Call(fn, params, (state, *args))


def noise(*shape: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(5).standard_normal(shape, np.float32))


def tokens(*shape: int, vocabulary: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(5).integers(0, vocabulary, shape, np.int32))


class MLP(nn.Module):
    sizes: Sequence[int]

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.relu(nn.Dense(size)(x))
        return nn.Dense(self.sizes[-1])(x)


@model(linear={"Dense_0/kernel": "io", "Dense_1/kernel": "io"}, also={"Dense_2/kernel": "io"})
def linen_mlp() -> Call:
    return called(MLP((32, 28, 24)), noise(6, 24))


@model(
    linear={"params/Dense_0/kernel": "io", "params/Dense_1/kernel": "io"},
    also={"params/Dense_2/kernel": "io"},
)
def linen_mlp_by_its_bound_apply() -> Call:
    module, x = MLP((32, 28, 24)), noise(6, 24)
    return Call(module.apply, drawn(module.init, _KEY, x), (x,))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        for features, strides in ((16, 1), (24, 2)):
            x = nn.Conv(features, (3, 3), strides, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(24)(x)


_CNN = {
    "linear": {"Conv_0/kernel": "iiio", "Conv_1/kernel": "iiio"},
    "also": {"Dense_0/kernel": "io"},
}


@model(**_CNN)
def linen_cnn_in_training() -> Call:
    return called(CNN(), noise(2, 8, 8, 8), mutable=["batch_stats"], train=True)


@model(**_CNN)
def linen_cnn_in_evaluation() -> Call:
    return called(CNN(), noise(2, 8, 8, 8), train=False)


class ResNetBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (3, 3), 2, use_bias=False, name="conv1")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=False)(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False, name="conv2")(y)
        y = nn.BatchNorm(use_running_average=False, scale_init=nn.initializers.zeros_init())(y)
        shortcut = nn.Conv(self.features, (1, 1), 2, use_bias=False, name="shortcut")(x)
        return nn.relu(nn.BatchNorm(use_running_average=False)(shortcut) + y)


@model(linear={"conv1/kernel": "iiio", "conv2/kernel": "iiio", "shortcut/kernel": "iiio"})
def linen_resnet_block() -> Call:
    return called(ResNetBlock(24), noise(2, 8, 8, 16), mutable=["batch_stats"])


@model(linear={}, also={"kernel": "iio"})
def linen_transposed_convolution_in_one_dimension() -> Call:
    return called(nn.ConvTranspose(24, (3,), (2,)), noise(2, 6, 16))


class UpAndDown(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=2)(x))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(x))
        x = nn.relu(nn.ConvTranspose(24, (2, 2), (2, 2))(x))
        return nn.Conv(12, (1, 1), name="head")(x)


@model(
    linear={
        "Conv_0/kernel": "iiio",
        "depthwise/kernel": "iiio",
        "ConvTranspose_0/kernel": "iiio",
    },
    also={"head/kernel": "iiio"},
    dense=frozenset({"depthwise/kernel"}),
)
def linen_grouped_depthwise_and_transposed_convolutions() -> Call:
    return called(UpAndDown(), noise(2, 6, 6, 16))


_ATTENTION = {"query/kernel": "ioo", "key/kernel": "ioo", "value/kernel": "ioo"}
_ATTENTION_AND_OUT = {**_ATTENTION, "out/kernel": "iio"}


class EncoderBlock(nn.Module):
    rate: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x, mask=None):
        deterministic = self.rate == 0
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(
            4, dropout_rate=self.rate, deterministic=deterministic, name="attention"
        )(y, mask=mask)
        x = x + nn.Dropout(self.rate, deterministic=deterministic)(y)
        y = nn.gelu(nn.Dense(48, name="up")(nn.LayerNorm()(x)))
        y = nn.Dropout(self.rate, deterministic=deterministic)(y)
        return x + nn.Dense(24, name="down")(y)


_BLOCK = {**prefixed("attention", _ATTENTION_AND_OUT), "up/kernel": "io", "down/kernel": "io"}


@model(linear=_BLOCK)
def linen_encoder_block() -> Call:
    return called(EncoderBlock(), noise(2, 7, 24))


@model(linear=_BLOCK, float32_because="dropout would draw another mask")
def linen_encoder_block_with_dropout() -> Call:
    return called(EncoderBlock(rate=0.25), noise(2, 7, 24), rngs={"dropout": jax.random.key(9)})


class ViT(nn.Module):
    """A vision transformer: a class token and a position table, which no adapter fits."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(24, (4, 4), (4, 4), padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = self.param("class_token", nn.initializers.normal(1.0), (1, 1, 24))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(1.0), (1, x.shape[1], 24))
        x = EncoderBlock(name="block")(x)
        return nn.Dense(24, name="head")(nn.LayerNorm()(x)[:, 0])


@model(
    linear={"patches/kernel": "iiio", **prefixed("block", _BLOCK)},
    also={"head/kernel": "io"},
)
def linen_vision_transformer() -> Call:
    return called(ViT(), noise(2, 8, 8, 3))


class TiedLanguageModel(nn.Module):
    """A causal language model whose head is its embedding, transposed."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(60, 24, name="embed")
        positions = nn.Embed(16, 24, name="positions")(jnp.arange(ids.shape[-1]))
        x = embed(ids) + positions
        x = EncoderBlock(name="block")(x, mask=nn.make_causal_mask(ids))
        return embed.attend(nn.LayerNorm()(x))


@model(
    linear=prefixed("block", _BLOCK),
    also={"embed/embedding": "io", "positions/embedding": "io"},
)
def linen_language_model_with_tied_head() -> Call:
    return called(TiedLanguageModel(), tokens(2, 7, vocabulary=60))


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        return EncoderBlock(name="block")(x, mask), None


class ScannedTransformer(nn.Module):
    layers: int = 3

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(60, 24, name="embed")
        stack = nn.scan(
            nn.remat(ScannedBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )
        x, _ = stack(name="stack")(embed(ids), nn.make_causal_mask(ids))
        return embed.attend(nn.LayerNorm()(x))


@model(
    linear={f"stack/block/{path}": f"b{letters}" for path, letters in _BLOCK.items()},
    also={"embed/embedding": "io"},
)
def linen_scan_over_remat() -> Call:
    return called(ScannedTransformer(), tokens(2, 7, vocabulary=60))


class CachedDecoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(4, decode=True, name="attention")(nn.LayerNorm()(x))
        x = x + y
        return x + nn.Dense(24, name="down")(nn.gelu(nn.Dense(48, name="up")(x)))


@model(linear=_BLOCK)
def linen_decoder_with_cache() -> Call:
    """One step of decoding, with the new cache as a second output."""
    return called(CachedDecoder(), noise(2, 1, 24), mutable=["cache"], init_args=(noise(2, 5, 24),))


@model(linear=_BLOCK)
def linen_decoder_with_cache_scanned_over_time() -> Call:
    """Five steps of decoding, with the cache as the carry of a scan."""
    step, params, (state, _) = called(
        CachedDecoder(), noise(2, 1, 24), mutable=["cache"], init_args=(noise(2, 5, 24),)
    )

    def decode(params: Any, state: Any, xs: jax.Array) -> Any:
        def body(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            y, state = step(params, state, x)
            return state, y

        return jax.lax.scan(body, state, xs)

    return Call(decode, params, (state, noise(5, 2, 1, 24)))


@model(linear=prefixed("params", _BLOCK))
def linen_decoder_with_its_cache_among_the_parameters() -> Call:
    """All variables in one tree: the cache's arrays of four axes are no weights."""
    fn, params, (state, x) = called(
        CachedDecoder(), noise(2, 1, 24), mutable=["cache"], init_args=(noise(2, 5, 24),)
    )

    def of_variables(variables: Any, x: jax.Array) -> Any:
        return fn(variables["params"], {"cache": variables["cache"]}, x)

    return Call(of_variables, {"params": params, **state}, (x,))


class CrossAttention(nn.Module):
    """A decoder's block that attends to what an encoder gave."""

    @nn.compact
    def __call__(self, x, memory):
        attend = nn.MultiHeadDotProductAttention(4, qkv_features=32, out_features=24, name="cross")
        x = x + attend(nn.LayerNorm()(x), memory)
        return x + nn.DenseGeneral(24, axis=(-2, -1), name="mix")(x.reshape(2, 5, 4, 6))


@model(linear={**prefixed("cross", _ATTENTION_AND_OUT), "mix/kernel": "iio"})
def linen_cross_attention() -> Call:
    return called(CrossAttention(), noise(2, 5, 24), noise(2, 7, 20))


class Recurrent(nn.Module):
    """A cell over time, from a carry that is given: a cell's own is of a dtype of its own."""

    cell: nn.RNNCellBase

    @nn.compact
    def __call__(self, x, carry):
        hidden = nn.RNN(self.cell, name="rnn")(x, initial_carry=carry)
        return nn.Dense(24, name="head")(hidden[:, -1])


def called_over_time(cell: nn.RNNCellBase, x: jax.Array) -> Call:
    return called(Recurrent(cell), x, cell.initialize_carry(_KEY, x[:, 0].shape))


_OUTSIDE = ("ii/kernel", "if/kernel", "ig/kernel", "io/kernel")
_INSIDE = ("hi/kernel", "hf/kernel", "hg/kernel", "ho/kernel")


@model(
    linear=prefixed("cell", dict.fromkeys((*_OUTSIDE, *_INSIDE), "io")),
    also={"head/kernel": "io"},
)
def linen_optimized_lstm() -> Call:
    """The cell concatenates its gates' kernels in the body of the scan."""
    return called_over_time(nn.OptimizedLSTMCell(24), noise(2, 6, 20))


@model(
    linear=prefixed("cell", dict.fromkeys((*_OUTSIDE, *_INSIDE), "io")),
    also={"head/kernel": "io"},
)
def linen_lstm() -> Call:
    return called_over_time(nn.LSTMCell(24), noise(2, 6, 20))


@model(
    linear=prefixed(
        "cell",
        dict.fromkeys(
            ("ir/kernel", "iz/kernel", "in/kernel", "hr/kernel", "hz/kernel", "hn/kernel"), "io"
        ),
    ),
    also={"head/kernel": "io"},
)
def linen_gru() -> Call:
    return called_over_time(nn.GRUCell(24), noise(2, 6, 20))


@model(
    linear=prefixed("cell", {"ih/kernel": "iio", "hh/kernel": "iio"}),
    also={"head/kernel": "io"},
)
def linen_convolutional_lstm() -> Call:
    return called_over_time(nn.ConvLSTMCell(12, (3,)), noise(2, 4, 6, 16))


class Expert(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(24, name="down")(nn.gelu(nn.Dense(48, name="up")(x)))


class MixtureOfExperts(nn.Module):
    experts: int = 4

    @nn.compact
    def __call__(self, x):
        gates = nn.softmax(nn.Dense(self.experts, name="router")(x))
        every = nn.vmap(
            Expert,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=-2,
            axis_size=self.experts,
        )(name="experts")(x)
        return x + jnp.einsum("...e,...ed->...d", gates, every)


@model(
    linear={
        "router/kernel": "io",
        "experts/up/kernel": "oio",
        "experts/down/kernel": "bio",
    },
)
def linen_mixture_of_experts() -> Call:
    """All experts read the same input, so that the first kernel is one matrix to all of them."""
    return called(MixtureOfExperts(), noise(2, 5, 24))


class Einsums(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.Einsum((24, 4, 8), "te,ehd->thd", name="split")(x)
        heads = nn.gelu(nn.Einsum((4, 8, 12), "thd,hdk->thk", name="each")(heads))
        x = nn.DenseGeneral((6, 4), axis=(-2, -1), name="general")(heads)
        return nn.Einsum((24, 6, 4), "thk,ohk->to", use_bias=False, name="join")(x)


@model(
    linear={
        "split/kernel": "ioo",
        "each/kernel": "bio",
        "general/kernel": "iioo",
    },
    also={"join/kernel": "oii"},
)
def linen_einsum_and_dense_general() -> Call:
    return called(Einsums(), noise(9, 24))


class Normalized(nn.Module):
    """A kernel that is divided by its own norm before it is used."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.WeightNorm(nn.Dense(32, name="layer"), name="norm")(x))
        x = nn.relu(nn.Dense(28, name="plain")(x))
        return nn.Dense(24, name="head")(x)


@model(
    linear={"plain/kernel": "io"},
    also={"head/kernel": "io"},
    by_hand={"layer/kernel": "io"},
    materialized={"layer/kernel": "its norm is not a linear function of it"},
)
def linen_weight_norm() -> Call:
    return called(Normalized(), noise(6, 24))
