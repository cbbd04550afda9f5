"""Tokens that are added to a model: their file, their rows, and the tokenizer in step."""

import jax
import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.models.added_tokens import AddedToken, read_added_tokens
from experiments.models.pretrained import LanguageModel
from tests import tiny_llama, tiny_tokenizer
from tests.experiments.small_llm_study import write_encoder_decoder

for module in ("safetensors", "tokenizers", "jinja2"):
    pytest.importorskip(module)

# The tokenizer has fewer tokens than the model has rows: the first ones take rows that are there.
SPARE = tiny_llama.VOCABULARY - len(tiny_tokenizer.trained()[1])


def write_untied(path):
    tiny_llama.write_folder(path, "mistral")
    tiny_tokenizer.write_folder(path)


def write_tied(path):
    tiny_llama.write_folder(path, "llama")
    tiny_tokenizer.write_folder(path)


MODELS = {"tied": write_tied, "untied": write_untied, "t5": write_encoder_decoder}


@pytest.fixture(params=sorted(MODELS))
def model(request, tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    MODELS[request.param](path)
    return LanguageModel.read(path)


def added(count):
    return [AddedToken(f"<new{k}>", "hello world" if k % 2 else None) for k in range(count)]


@pytest.mark.parametrize("count", [2, SPARE + 3])
def test_a_model_grows_as_far_as_it_has_to(model, count):
    larger = model.with_tokens(added(count))
    assert larger.config.vocab_size == max(model.config.vocab_size, largest_id(model) + 1 + count)
    params, before = larger.params(), model.params()
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, larger.shapes())
    ids = larger.added_ids
    table, old = (np.asarray(each["embed"]["embedding"]) for each in (params, before))
    tokens = model.tokenizer().encoded("hello world", begins=False)
    for number, each in zip(ids, added(count), strict=True):
        expected = old.mean(0) if each.start is None else old[tokens].mean(0)
        np.testing.assert_allclose(table[number], expected, rtol=1e-5, atol=1e-6)
    others = np.setdiff1d(np.arange(len(old)), ids)
    np.testing.assert_array_equal(table[others], old[others])
    if "head" in params:
        own, first = (np.asarray(each["head"]["kernel"]) for each in (params, before))
        np.testing.assert_array_equal(own[:, others], first[:, others])
        np.testing.assert_allclose(own[:, ids[0]], first.mean(1), rtol=1e-5, atol=1e-6)
    assert_same_but_tables(params, before)


def largest_id(model):
    return model.tokenizer().largest_id


def assert_same_but_tables(params, before):
    for name in set(before) - {"embed", "head"}:
        for one, other in zip(
            jax.tree.leaves(params[name]), jax.tree.leaves(before[name]), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_the_tokenizer_is_in_step(model, tmp_path):
    larger = model.with_tokens(added(2))
    tokenizer = larger.tokenizer()
    assert larger.added_ids == [largest_id(model) + 1, largest_id(model) + 2]
    tokens = tokenizer.encoded("hello<new1> world", begins=False).tolist()
    assert larger.added_ids[1] in tokens
    assert tokenizer.decoded(tokens) == "hello<new1> world"
    # The model on the disk is as it was.
    assert largest_id(model) == larger.added_ids[0] - 1
    names = {path.name for path in tokenizer.files(tmp_path)}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    import tokenizers

    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.token_to_id("<new1>") == larger.added_ids[1]
    assert larger.huggingface_entries()["vocab_size"] == larger.config.vocab_size


def test_what_is_a_token_already(model):
    with pytest.raises(InputError, match="'hello' is a token of"):
        model.with_tokens([AddedToken("hello")])
    assert model.with_tokens([]) is model


def test_a_file_of_tokens(tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_text("#Person1#\tthe first person\n\n<laughs>\n", encoding="utf-8")
    assert read_added_tokens(path) == (
        AddedToken("#Person1#", "the first person"),
        AddedToken("<laughs>"),
    )
    for text, message in (("", "has no tokens"), ("a\nb\na\n", "has 'a' twice")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_added_tokens(path)
    with pytest.raises(InputError, match="can't be read"):
        read_added_tokens(tmp_path / "nothing.txt")
