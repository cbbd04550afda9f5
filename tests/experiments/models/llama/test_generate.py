"""Texts: with a cache as without one, in a batch as one by one, adapted as merged, and drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from benchmarks.programs import Cost
from experiments.models.generation import Sampling, generate
from experiments.models.llama import Llama
from tests import tiny_llama
from tests.trained import as_if_trained

pytestmark = pytest.mark.slow

NEW = 6


def written(apply, params, prompts, end_ids=(VOCABULARY := tiny_llama.VOCABULARY,)):
    lengths = jnp.array([len(each) for each in prompts])
    width = max(map(len, prompts))
    tokens = jnp.asarray([[*each, *[0] * (width - len(each))] for each in prompts])
    run = functools.partial(generate, apply, new_tokens=NEW, end_ids=end_ids)
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
    found = written(model.apply, params, prompts)
    expected = [without_cache(model, params, prompt) for prompt in prompts]
    assert found.tolist() == expected


@pytest.mark.usefixtures("optimised")
def test_there_is_one_cache():
    """A program that writes has it once, and beside it what one layer reads."""
    layers, batch, width = 8, 4, 32
    model = Llama(tiny_llama.config("llama", num_hidden_layers=layers))
    params = tiny_llama.params("llama", num_hidden_layers=layers)
    tokens = jax.ShapeDtypeStruct((batch, width), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def temporaries(new_tokens):
        run = functools.partial(generate, model.apply, new_tokens=new_tokens, end_ids=(0,))
        compiled = jax.jit(run).lower(params, tokens=tokens, lengths=lengths).compile()
        return Cost.of(compiled).temporary_bytes

    more = 1024
    grown = (temporaries(2 * more) - temporaries(more)) / more
    config = model.config
    of_layer = 2 * 4 * batch * config.num_key_value_heads * config.head_dim
    assert grown <= 1.5 * layers * of_layer


def test_an_answer_ends():
    model, params = Llama(tiny_llama.config("llama")), tiny_llama.params("llama")
    prompts = [list(map(int, tiny_llama.tokens(1, 5)[0]))]
    free = written(model.apply, params, prompts)[0].tolist()
    place = next(n for n in range(1, NEW) if free[n] not in free[:n])
    ended = written(model.apply, params, prompts, end_ids=(free[place],))[0].tolist()
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
    base = written(model.apply, params, prompts)
    adapted = written(lora_jax.adapt(model.apply), trained, prompts)
    merged = written(model.apply, lora_jax.merge(trained), prompts)
    np.testing.assert_array_equal(adapted, merged)
    assert (adapted != base).any()


def test_each_prompt_has_its_own_adapter():
    """All of the writing is a function that `serving.adapt` takes as it is."""
    model, params = Llama(tiny_llama.config("qwen3")), tiny_llama.params("qwen3")
    axes = {"mlp": ("batch", "in", "out")}
    adapters = [
        as_if_trained(lora_jax.wrap(params, "mlp", rank=2, axes=axes), seed) for seed in (1, 2)
    ]
    prompts = [list(map(int, tiny_llama.tokens(1, 5, seed=n)[0])) for n in range(3)]
    run = functools.partial(generate, model.apply, new_tokens=NEW, end_ids=(300,))
    bank, ids = lora_jax.serving.bank(adapters), jnp.array([1, -1, 0])
    served = jax.jit(
        lora_jax.serving.adapt(lambda params, tokens: run(params, tokens=tokens, lengths=LENGTHS))
    )
    found = np.asarray(served(bank, ids, jnp.asarray(prompts)))
    trees = [adapters[1], params, adapters[0]]
    expected = [
        written(lora_jax.adapt(model.apply), tree, [prompt])[0]
        for tree, prompt in zip(trees, prompts, strict=True)
    ]
    np.testing.assert_array_equal(found, expected)
    assert len({tuple(row) for row in found.tolist()}) == 3


LENGTHS = jnp.array([5])


def test_drawing_needs_a_key_and_repeats_with_it():
    model, params = Llama(tiny_llama.config("llama")), tiny_llama.params("llama")
    tokens = jnp.asarray(tiny_llama.tokens(3, 5))
    run = functools.partial(
        generate,
        model.apply,
        tokens=tokens,
        lengths=jnp.array([5, 5, 5]),
        new_tokens=NEW,
        end_ids=(300,),
        sampling=Sampling(temperature=2.0, top_p=0.9),
    )
    with pytest.raises(ValueError, match="`key` is None; expected a key"):
        run(params)
    drawn = jax.jit(lambda key: run(params, key=key))
    first, again, other = (np.asarray(drawn(jax.random.key(n))) for n in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
