"""Soft prompts: what they start from, how they are hidden, and the study with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.common.errors import InputError
from experiments.llm.examples import Example
from experiments.llm.loss import losses_at_places
from experiments.llm.packing import Row, batch_of, learned_count
from experiments.llm.soft_prompt import PromptedTexts, start_of, without_prompt
from experiments.llm.texts import AnsweredTexts, ContinuedTexts
from experiments.models.llama import Llama
from experiments.models.t5 import T5
from lora_jax.exchange import peft
from tests import tiny_llama, tiny_t5
from tests.agreement import assert_agree
from tests.experiments.small_llm_study import (
    write_encoder_decoder,
    write_model,
)
from tests.tiny_tokenizer import chat_tokenizer

for module in ("safetensors", "tokenizers", "jinja2"):
    pytest.importorskip(module)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore:Input and output embeddings are no longer tied",
)

COUNT = 4
KINDS = {"llama": write_model, "t5": write_encoder_decoder}


def network_of(kind, **options):
    if kind == "llama":
        return Llama(tiny_llama.config("qwen3"), **options), tiny_llama.params("qwen3")
    return T5(tiny_t5.config("1.1"), **options), tiny_t5.params("1.1")


def texts_of(kind):
    tokenizer = chat_tokenizer(ends_texts=True)
    return ContinuedTexts(tokenizer) if kind == "llama" else AnsweredTexts(tokenizer, 0)


def batch_with(texts):
    pairs = [("hello", "the world"), ("the other", "hello"), ("world", "there")]
    examples = [texts.example(Example("x", prompt=a, completion=b)) for a, b in pairs]
    rows = [Row((0, 1)), Row((2,))]
    source = None if examples[0].source is None else 32
    room = learned_count(examples, rows)
    return batch_of(examples, rows, length=32, room=room, source_length=source)


# --- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_texts_begin_with_the_prompt(kind):
    plain = texts_of(kind)
    texts = PromptedTexts(plain, COUNT)
    prompt = [-1, -2, -3, -4]
    messages = [{"role": "user", "content": "hello"}]
    for found, without in (
        (texts.question(messages), plain.question(messages)),
        (texts.prompt("hello"), plain.prompt("hello")),
    ):
        assert found.tolist() == [*prompt, *without]
    example = Example("x", prompt="hello", completion="world")
    found, without = texts.example(example), plain.example(example)
    if kind == "llama":
        assert found.tokens.tolist() == [*prompt, *without.tokens]
        assert found.learned.tolist() == [False] * COUNT + without.learned.tolist()
    else:
        assert found.source.tolist() == [*prompt, *without.source]
        np.testing.assert_array_equal(found.tokens, without.tokens)


def test_the_first_token_of_a_text_is_not_learned():
    texts = PromptedTexts(texts_of("llama"), COUNT)
    example = Example("x", prompt="hello", completion="world")
    learned = texts.example(example, learn_prompts=True).learned
    assert learned.tolist() == [False] * (COUNT + 1) + [True] * (len(learned) - COUNT - 1)


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_hidden_prompt_is_none(kind):
    """Losses and their gradients: whatever its vectors are."""
    plain, params = network_of(kind)
    network, _ = network_of(kind, prompt_length=COUNT)
    width = params["embed"]["embedding"].shape[1]
    vectors = 5 * np.random.default_rng(0).standard_normal((COUNT, width)).astype(np.float32)

    def of(apply, batch):
        def summed(params):
            return losses_at_places(apply, params, batch).sum()

        return jax.jit(jax.value_and_grad(summed))

    expected = of(plain.apply, batch_with(texts_of(kind)))(params)
    batch = batch_with(PromptedTexts(texts_of(kind), COUNT))
    both = {**params, "soft_prompt": jnp.asarray(vectors)}
    loss, gradients = of(network.apply, without_prompt(batch))(both)
    assert not np.asarray(gradients.pop("soft_prompt")).any()
    assert_agree((loss, gradients), expected, tolerance=1e-4)
    shown, _ = of(network.apply, batch)(both)
    assert abs(float(shown) - float(expected[0])) > 0.1


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_a_prompt_starts_from(kind, tmp_path):
    network, params = network_of(kind)
    tokenizer = texts_of(kind).tokenizer
    table = np.asarray(params["embed"]["embedding"])

    def start(source, seed=0):
        return start_of(network.apply, params, tokenizer, COUNT, source, seed=seed)

    tokens = tokenizer.encoded("hello world", begins=False)
    np.testing.assert_array_equal(start("hello world"), table[np.resize(tokens, COUNT)])
    drawn = np.asarray(start(None))
    assert all((row == table).all(axis=1).any() for row in drawn)
    np.testing.assert_array_equal(start(None), drawn)
    assert not np.array_equal(start(None, seed=1), drawn)
    peft.save_prompt(tmp_path / "prompt", jnp.asarray(drawn) + 1)
    np.testing.assert_array_equal(start(str(tmp_path / "prompt")), drawn + 1)
    peft.save_prompt(tmp_path / "longer", jnp.ones((COUNT + 1, table.shape[1])))
    with pytest.raises(InputError, match="a prompt of 5 vectors of .* expected --soft-prompt 4"):
        start(str(tmp_path / "longer"))
    with pytest.raises(InputError, match="is a text without tokens"):
        start("")


def test_a_prompt_starts_from_quantised_weights():
    network, params = network_of("llama")
    quantized = lora_jax.quantize(params, "embed", format="int8", axes={"embed": ("in", "out")})
    found = start_of(network.apply, quantized, chat_tokenizer(), COUNT, "hello", seed=0)
    expected = start_of(network.apply, params, chat_tokenizer(), COUNT, "hello", seed=0)
    np.testing.assert_allclose(found, expected, atol=0.1)
