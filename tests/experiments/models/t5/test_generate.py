"""Texts: with a cache as without one, in a batch as one by one, adapted as merged, and drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.models.generation import Sampling, generate
from experiments.models.names import huggingface_rules
from experiments.models.t5 import T5
from lora_jax.exchange import peft
from tests import tiny_t5
from tests.trained import as_if_trained

pytestmark = pytest.mark.slow

NEW = 8
TARGETS = "(attention|cross_attention|mlp)/.*kernel"


def written(apply, params, prompts, end_ids=(tiny_t5.VOCABULARY,)):
    lengths = jnp.array([len(each) for each in prompts])
    width = max(map(len, prompts))
    tokens = jnp.asarray([[*each, *[0] * (width - len(each))] for each in prompts])
    run = functools.partial(generate, apply, new_tokens=NEW, end_ids=end_ids)
    return np.asarray(jax.jit(run)(params, tokens=tokens, lengths=lengths))


def without_cache(model, params, prompt):
    tokens = [model.config.decoder_start_token_id]
    apply = jax.jit(model.apply)
    for _ in range(NEW):
        # One width, so one program: what is behind the tokens so far is not seen.
        row = np.array([[*tokens, *[0] * (NEW - len(tokens))]], np.int32)
        logits = apply({"params": params}, np.array([prompt]), row)[0, len(tokens) - 1]
        tokens.append(int(jnp.argmax(logits)))
    return tokens[1:]


def prompts_of(lengths):
    return [tiny_t5.tokens(1, length, seed=length)[0].tolist() for length in lengths]


def adapted_params(version, seed):
    params = tiny_t5.params(version)
    axes = peft.preview(params, names=huggingface_rules(tiny_t5.config(version))).axes
    return as_if_trained(lora_jax.wrap(params, TARGETS, rank=2, axes=axes), seed)


@pytest.mark.parametrize("version", sorted(tiny_t5.CHANGES))
def test_a_batch_is_its_prompts_one_by_one_without_a_cache(version):
    # The decoder begins with a token that is not padding.
    model = T5(tiny_t5.config(version, decoder_start_token_id=3))
    params, prompts = tiny_t5.params(version), prompts_of((5, 30))
    found = written(model.apply, params, prompts)
    assert found.tolist() == [without_cache(model, params, prompt) for prompt in prompts]


def test_an_answer_ends():
    model, params = T5(tiny_t5.config("flan")), tiny_t5.params("flan")
    prompts = prompts_of((9,))
    free = written(model.apply, params, prompts)[0].tolist()
    place = next(n for n in range(1, NEW) if free[n] not in free[:n])
    ended = written(model.apply, params, prompts, end_ids=(free[place],))[0].tolist()
    assert ended == free[: place + 1] + [free[place]] * (NEW - place - 1)


def test_adapted_is_merged():
    model, params = T5(tiny_t5.config("1.1")), tiny_t5.params("1.1")
    wrapped, prompts = adapted_params("1.1", 1), prompts_of((5, 12))
    base = written(model.apply, params, prompts)
    adapted = written(lora_jax.adapt(model.apply), wrapped, prompts)
    merged = written(model.apply, lora_jax.merge(wrapped), prompts)
    np.testing.assert_array_equal(adapted, merged)
    assert (adapted != base).any()


def test_each_prompt_has_its_own_adapter():
    """All of the writing is a function that `serving.adapt` takes as it is."""
    model, params = T5(tiny_t5.config("flan")), tiny_t5.params("flan")
    adapters = [adapted_params("flan", seed) for seed in (1, 2)]
    prompts = [tiny_t5.tokens(1, 5, seed=n)[0].tolist() for n in range(3)]
    run = functools.partial(generate, model.apply, new_tokens=NEW, end_ids=(300,))
    lengths = jnp.array([5])
    served = jax.jit(
        lora_jax.serving.adapt(lambda params, tokens: run(params, tokens=tokens, lengths=lengths))
    )
    bank, ids = lora_jax.serving.bank(adapters), jnp.array([1, -1, 0])
    found = np.asarray(served(bank, ids, jnp.asarray(prompts)))
    trees = [adapters[1], params, adapters[0]]
    expected = [
        written(lora_jax.adapt(model.apply), tree, [prompt])[0]
        for tree, prompt in zip(trees, prompts, strict=True)
    ]
    np.testing.assert_array_equal(found, expected)
    assert len({tuple(row) for row in found.tolist()}) == 3


def test_drawing_repeats_with_its_key():
    model, params = T5(tiny_t5.config("1.0")), tiny_t5.params("1.0")
    tokens, lengths = jnp.asarray(tiny_t5.tokens(3, 5)), jnp.array([5, 5, 5])
    sampling = Sampling(temperature=2.0, top_p=0.9)
    run = functools.partial(
        generate, model.apply, new_tokens=NEW, end_ids=(300,), sampling=sampling
    )
    drawn = jax.jit(lambda key: run(params, tokens, lengths, key=key))
    first, again, other = (np.asarray(drawn(jax.random.key(n))) for n in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
