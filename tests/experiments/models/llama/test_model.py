"""The decoder: what a token sees, packed rows, blocks of queries, the cache, and less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.programs import Cost
from experiments.models import attention
from experiments.models.llama import Llama
from tests import tiny_llama
from tests.agreement import assert_agree

MODELS = sorted(tiny_llama.CHANGES)


@functools.cache
def applied(model_type, **options):
    model = Llama(tiny_llama.config(model_type), **options)
    return jax.jit(model.apply, static_argnames="method")


def logits(model_type, *arguments, **options):
    variables = {"params": tiny_llama.params(model_type)}
    return applied(model_type, **options)(variables, *arguments)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_packed_row_is_its_texts_one_by_one(model_type):
    first, second = tiny_llama.tokens(1, 10), tiny_llama.tokens(1, 14, seed=1)
    row = np.concatenate([first, second, np.zeros((1, 3), np.int32)], axis=1)
    positions = np.array([[*range(10), *range(14), 0, 0, 0]])
    segments = np.array([[1] * 10 + [2] * 14 + [0] * 3])
    packed = logits(model_type, row, positions, segments)
    assert_agree(packed[:, :10], logits(model_type, first))
    assert_agree(packed[:, 10:24], logits(model_type, second))
    # A text on its own starts at 0: rotations are of differences, so a shift changes nothing.
    shifted = logits(model_type, second, np.arange(14)[None] + 7)
    assert_agree(shifted, logits(model_type, second), tolerance=1e-4)


@pytest.mark.parametrize("model_type", MODELS)
def test_tokens_do_not_see_what_follows(model_type):
    tokens = tiny_llama.tokens()
    changed = tokens.copy()
    changed[:, 12:] = 1
    assert_agree(logits(model_type, tokens)[:, :12], logits(model_type, changed)[:, :12])


def test_a_window_ends_what_is_seen():
    tokens = tiny_llama.tokens(1, 24)
    changed = tokens.copy()
    changed[:, 0] = 1 + tokens[:, 0]
    before, after = (np.asarray(logits("mistral", each)) for each in (tokens, changed))
    # Through two layers a token reaches twice as far as the window of 8.
    assert np.abs(before - after)[:, 14].max() > 1e-3
    assert_agree(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("length", [23, 24, 25])
def test_blocks_of_queries_compute_the_same(monkeypatch, length):
    tokens, variables = tiny_llama.tokens(2, length), {"params": tiny_llama.params("qwen3")}
    model = Llama(tiny_llama.config("qwen3"))

    def loss(variables):
        return jnp.sum(jnp.tanh(model.apply(variables, tokens)))

    whole = jax.jit(jax.value_and_grad(loss))(variables)
    monkeypatch.setattr(attention, "QUERIES_OF_BLOCK", 8)
    assert_agree(jax.jit(jax.value_and_grad(loss))(variables), whole, tolerance=1e-4)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("length", [23, 24, 25])
def test_spans_of_queries_compute_the_same(monkeypatch, model_type, length):
    """With two texts in a row, and what fills it up: a span leaves out keys that it can't see."""
    row = tiny_llama.tokens(2, length)
    positions = np.array([[*range(10), *range(length - 12), 0, 0]] * 2)
    segments = np.array([[1] * 10 + [2] * (length - 12) + [0] * 2] * 2)
    variables = {"params": tiny_llama.params(model_type)}
    model = Llama(tiny_llama.config(model_type))

    def loss(variables):
        logits = model.apply(variables, row, positions, segments)
        return jnp.sum(jnp.tanh(logits[:, :-2]))

    def found():
        step = jax.jit(jax.value_and_grad(loss)).trace(variables)
        return str(step.jaxpr).count("dot_general"), step.lower().compile()(variables)

    products, whole = found()
    monkeypatch.setattr(attention, "LEAST_SPAN", 5)
    products_of_spans, by_spans = found()
    assert products_of_spans > products
    assert_agree(by_spans, whole, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("remat", [True, False])
def test_the_matrix_of_scores_is_never_in_memory(monkeypatch, remat):
    """Neither forward nor backward: what a step holds grows with the length, not as its square."""
    model = Llama(tiny_llama.config("llama"), remat=remat)
    variables = {"params": tiny_llama.params("llama")}
    monkeypatch.setattr(attention, "QUERIES_OF_BLOCK", 64)

    def temporaries(length):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(variables, tokens):
            return jnp.sum(model.apply(variables, tokens, method=Llama.hidden_states))

        step = jax.jit(jax.grad(loss)).lower(variables, tokens).compile()
        return Cost.of(step).temporary_bytes

    assert temporaries(2048) <= 2.3 * temporaries(1024)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_cache_gives_the_same_token_by_token(model_type):
    tokens = tiny_llama.tokens(2, 12)
    settings = tiny_llama.config(model_type)
    variables = {"params": tiny_llama.params(model_type)}
    cache = Llama(settings).empty_cache(2, 16)
    apply = applied(model_type)
    hidden, cache = apply(variables, tokens[:, :9], cache, method=Llama.with_cache)
    pieces = [hidden]
    for place in range(9, 12):
        hidden, cache = apply(
            variables, tokens[:, place : place + 1], cache, method=Llama.with_cache
        )
        pieces.append(hidden)
    assert int(cache.length) == 12
    expected = apply(variables, tokens, method=Llama.hidden_states)
    assert_agree(jnp.concatenate(pieces, axis=1), expected, tolerance=1e-4)


@pytest.mark.usefixtures("optimised")
def test_a_step_without_remat_keeps_arguments_and_not_what_is_computed_of_them():
    """For each layer those of norms, of attention and of the gate, where no weight trains."""
    layers, length = 16, 256
    model = Llama(tiny_llama.config("llama", num_hidden_layers=layers))
    variables = {"params": tiny_llama.params("llama", num_hidden_layers=layers)}
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(change, variables, tokens):
        params = variables["params"]
        moved = {**params, "embed": jax.tree.map(lambda leaf: leaf + change, params["embed"])}
        return jnp.sum(model.apply({"params": moved}, tokens, method=Llama.hidden_states))

    step = jax.jit(jax.grad(loss)).lower(jnp.float32(0), variables, tokens).compile()
    config = model.config
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    numbers = 2 * config.hidden_size + heads * config.head_dim + 2 * config.intermediate_size
    assert Cost.of(step).temporary_bytes <= 1.6 * 4 * layers * length * numbers


def test_remat_and_bfloat16():
    tokens, variables = tiny_llama.tokens(), {"params": tiny_llama.params("qwen2")}

    def gradient(**options):
        model = Llama(tiny_llama.config("qwen2"), **options)
        return jax.jit(jax.grad(lambda v: jnp.sum(jnp.tanh(model.apply(v, tokens)))))(variables)

    assert_agree(gradient(remat=True), gradient(), tolerance=1e-4)
    narrow = logits("qwen2", tokens, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    wide = np.asarray(logits("qwen2", tokens))
    assert np.abs(np.asarray(narrow, np.float32) - wide).max() <= 0.05 * np.abs(wide).max()
