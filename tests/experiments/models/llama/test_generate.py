"""Greedy texts: with a cache as without one, in a batch as one by one, adapted as merged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.models.llama import Llama, greedy
from tests import tiny_llama

NEW = 6


def written(apply, params, model, prompts, end_ids=(VOCABULARY := tiny_llama.VOCABULARY,)):
    lengths = jnp.array([len(each) for each in prompts])
    width = max(map(len, prompts))
    tokens = jnp.asarray([[*each, *[0] * (width - len(each))] for each in prompts])
    run = functools.partial(greedy, apply, model=model, new_tokens=NEW, end_ids=end_ids)
    return np.asarray(jax.jit(run)(params, tokens=tokens, lengths=lengths))


def without_cache(model, params, prompt):
    tokens = list(prompt)
    apply = jax.jit(model.apply)
    for _ in range(NEW):
        # One width, so one program: what is behind the prompt is not seen.
        row = np.array([[*tokens, *[0] * (20 - len(tokens))]], np.int32)
        logits = apply({"params": params}, row)[0, len(tokens) - 1]
        tokens.append(int(jnp.argmax(logits)))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("model_type", sorted(tiny_llama.CHANGES))
def test_a_batch_is_its_prompts_one_by_one_without_a_cache(model_type):
    model, params = Llama(tiny_llama.config(model_type)), tiny_llama.params(model_type)
    prompts = [list(map(int, tiny_llama.tokens(1, n, seed=n)[0])) for n in (5, 9)]
    found = written(model.apply, params, model, prompts)
    expected = [without_cache(model, params, prompt) for prompt in prompts]
    assert found.tolist() == expected


def test_an_answer_ends():
    model, params = Llama(tiny_llama.config("llama")), tiny_llama.params("llama")
    prompts = [list(map(int, tiny_llama.tokens(1, 5)[0]))]
    free = written(model.apply, params, model, prompts)[0].tolist()
    place = next(n for n in range(1, NEW) if free[n] not in free[:n])
    ended = written(model.apply, params, model, prompts, end_ids=(free[place],))[0].tolist()
    assert ended == free[: place + 1] + [free[place]] * (NEW - place - 1)


def test_adapted_is_merged():
    model, params = Llama(tiny_llama.config("qwen2")), tiny_llama.params("qwen2")
    axes = {"mlp": ("batch", "in", "out")}
    wrapped = lora_jax.wrap(params, "mlp", rank=2, axes=axes)
    trained = jax.tree.map(
        lambda label, leaf: leaf + 0.3 if label == "lora_B" else leaf,
        lora_jax.labels(wrapped),
        wrapped,
    )
    prompts = [list(map(int, tiny_llama.tokens(1, 5)[0]))]
    base = written(model.apply, params, model, prompts)
    adapted = written(lora_jax.adapt(model.apply), trained, model, prompts)
    merged = written(model.apply, lora_jax.merge(trained), model, prompts)
    np.testing.assert_array_equal(adapted, merged)
    assert (adapted != base).any()
