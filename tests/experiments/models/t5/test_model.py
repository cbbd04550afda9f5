"""The encoder-decoder: what tokens see, packed rows, blocks of queries, the cache, less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.programs import Cost
from experiments.models import attention
from experiments.models.attention import Places
from experiments.models.t5 import T5
from tests import tiny_t5
from tests.agreement import assert_agree

VERSIONS = sorted(tiny_t5.CHANGES)


@functools.cache
def applied(version, **options):
    model = T5(tiny_t5.config(version), **options)
    return jax.jit(model.apply, static_argnames="method")


def logits(version, *arguments, **options):
    variables = {"params": tiny_t5.params(version)}
    return applied(version, **options)(variables, *arguments)


def packed(parts, width):
    """Returns texts as a row that is filled up, and where they are in it."""
    missing = width - sum(each.shape[1] for each in parts)
    row = np.concatenate([*parts, np.full((1, missing), 7, np.int32)], axis=1)
    positions = np.concatenate([*map(np.arange, (each.shape[1] for each in parts))])
    segments = np.repeat(np.arange(1, len(parts) + 1), [each.shape[1] for each in parts])
    positions, segments = (np.pad(each, (0, missing))[None] for each in (positions, segments))
    return row, Places(jnp.asarray(positions), jnp.asarray(segments))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_packed_row_is_its_texts_one_by_one(version):
    inputs = [tiny_t5.tokens(1, length, seed=length) for length in (10, 31, 3)]
    tokens = [tiny_t5.decoder_tokens(1, length, seed=length) for length in (25, 4, 9)]
    row, input_places = packed(inputs, 50)
    decoder_row, places = packed(tokens, 40)
    found = logits(version, row, decoder_row, input_places, places)
    assert np.isfinite(found).all()
    start = 0
    for own_inputs, own_tokens in zip(inputs, tokens, strict=True):
        part = found[:, start : start + own_tokens.shape[1]]
        assert_agree(part, logits(version, own_inputs, own_tokens))
        start += own_tokens.shape[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_tokens_see(version):
    inputs, tokens = tiny_t5.tokens(), tiny_t5.decoder_tokens()
    before = np.asarray(logits(version, inputs, tokens))
    changed = tokens.copy()
    changed[:, 12:] = 3
    after = np.asarray(logits(version, inputs, changed))
    assert_agree(before[:, :12], after[:, :12])
    assert np.abs(before[:, 12:] - after[:, 12:]).max(axis=(0, 2)).min() > 1e-3
    # The first token of the decoder sees all of the encoder's, of which the first sees the last.
    for place in (0, -1):
        changed = inputs.copy()
        changed[:, place] = 3
        after = np.asarray(logits(version, changed, tokens))
        assert np.abs(before - after).max(axis=(0, 2)).min() > 1e-3
    hidden = [
        applied(version)({"params": tiny_t5.params(version)}, each, method="encode").hidden
        for each in (inputs, changed)
    ]
    assert np.abs(hidden[0] - hidden[1])[:, 0].max() > 1e-3


def test_positions_count_by_their_differences():
    inputs, tokens = tiny_t5.tokens(1, 24), tiny_t5.decoder_tokens(1, 18)
    expected = np.asarray(logits("flan", inputs, tokens))
    shifted = [
        Places.of(jnp.asarray(each), np.arange(each.shape[1])[None] + shift, None)
        for each, shift in ((inputs, 7), (tokens, 40))
    ]
    assert_agree(logits("flan", inputs, tokens, *shifted), expected)
    spread = [Places.of(jnp.asarray(inputs), 2 * np.arange(24)[None], None)]
    assert np.abs(logits("flan", inputs, tokens, *spread) - expected).max() > 0.01


@pytest.mark.parametrize("length", [23, 24, 25])
def test_blocks_of_queries_compute_the_same(monkeypatch, length):
    inputs, tokens = tiny_t5.tokens(2, length), tiny_t5.decoder_tokens(2, length + 1)
    variables = {"params": tiny_t5.params("flan")}
    model = T5(tiny_t5.config("flan"))

    def loss(variables):
        return jnp.sum(jnp.tanh(model.apply(variables, inputs, tokens)))

    whole = jax.jit(jax.value_and_grad(loss))(variables)
    monkeypatch.setattr(attention, "QUERIES_OF_BLOCK", 8)
    assert_agree(jax.jit(jax.value_and_grad(loss))(variables), whole, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_the_matrix_of_scores_is_never_in_memory(monkeypatch):
    """Neither forward nor backward: what a step holds grows with the length, not as its square."""
    model = T5(tiny_t5.config("1.0"), remat=True)
    variables = {"params": tiny_t5.params("1.0")}
    monkeypatch.setattr(attention, "QUERIES_OF_BLOCK", 64)

    def temporaries(length):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(variables, inputs, tokens):
            return jnp.sum(model.apply(variables, inputs, tokens, method=T5.hidden_states))

        step = jax.jit(jax.grad(loss)).lower(variables, tokens, tokens).compile()
        return Cost.of(step).temporary_bytes

    assert temporaries(2048) <= 2.3 * temporaries(1024)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_cache_gives_the_same_token_by_token(version):
    inputs, tokens = tiny_t5.tokens(2, 30), tiny_t5.decoder_tokens(2, 26)
    variables, apply = {"params": tiny_t5.params(version)}, applied(version)
    source = apply(variables, inputs, method="encode")
    cache = T5(tiny_t5.config(version)).empty_cache(2, 32, source.places)
    hidden, cache = apply(variables, tokens[:, :9], cache, source.hidden, method="with_cache")
    known = jax.tree.map(np.asarray, cache.source)
    pieces = [hidden]
    for place in range(9, 26):
        hidden, cache = apply(variables, tokens[:, place : place + 1], cache, method="with_cache")
        pieces.append(hidden)
    assert int(cache.decoded.length) == 26
    np.testing.assert_array_equal(cache.source[0], known[0])
    expected = apply(variables, inputs, tokens, method="hidden_states")
    assert_agree(jnp.concatenate(pieces, axis=1), expected, tolerance=1e-4)


def test_keys_and_values_of_the_encoder_are_computed_once():
    """A token later on costs as much whether the text was short or, but for its scores, long."""
    settings = tiny_t5.config("flan")
    variables, token = {"params": tiny_t5.params("flan")}, jnp.zeros((1, 1), jnp.int32)

    def flops(length):
        model = T5(settings)
        inputs = jax.ShapeDtypeStruct((1, length), jnp.int32)
        prompt = jax.eval_shape(
            lambda inputs: model.apply(
                variables, inputs, jnp.array([length]), 4, method="read_prompts"
            ),
            inputs,
        )
        read = functools.partial(model.apply, method="read_token")
        step = jax.jit(read).lower(variables, token[:, 0], prompt[1]).compile()
        return Cost.of(step).flops

    per_token = (flops(512) - flops(256)) / 256
    width = settings.num_heads * settings.d_kv
    scores_and_values = 4 * width * settings.num_decoder_layers
    projections = 4 * width * settings.d_model * settings.num_decoder_layers
    assert per_token < 2 * scores_and_values
    assert per_token < projections / 4


@pytest.mark.parametrize("version", VERSIONS)
def test_remat_and_bfloat16(version):
    inputs, tokens = tiny_t5.tokens(), tiny_t5.decoder_tokens()
    variables = {"params": tiny_t5.params(version)}

    def gradient(**options):
        model = T5(tiny_t5.config(version), **options)

        def loss(variables):
            return jnp.sum(jnp.tanh(model.apply(variables, inputs, tokens)))

        return jax.jit(jax.grad(loss))(variables)

    assert_agree(gradient(remat=True), gradient(), tolerance=1e-4)
    narrow = logits(version, inputs, tokens, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    assert_agree(np.asarray(narrow, np.float32), logits(version, inputs, tokens), tolerance=0.1)
