"""Tokenizers of folders, and chat templates."""

import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.models.tokenizer import tokenizer_of_folder
from tests.tiny_tokenizer import BEGIN, END, TEXTS, trained, write_folder

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

MESSAGES = [{"role": "user", "content": "Hello, world"}]


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path)
    return tmp_path


def test_texts_and_back(folder):
    tokenizer = tokenizer_of_folder(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS[:3]:
        found = tokenizer.encoded(text)
        np.testing.assert_array_equal(found, theirs.encode(text).ids)
        assert tokenizer.decoded(found) == text
    assert tokenizer.decoded(tokenizer.encoded(TEXTS[3])) == "one  two"
    assert tokenizer.end_ids == (0,)
    assert tokenizer.largest_id == len(trained()[1]) - 1


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_what_a_tokenizer_puts_around_texts(tmp_path, begins, ends):
    """It says so itself, and `encoded` asks for each of the two."""
    write_folder(tmp_path, single=[*[BEGIN] * begins, "$A", *[END] * ends])
    tokenizer = tokenizer_of_folder(tmp_path)
    assert tokenizer.encoded("a", ends=True).tolist() == [1] * begins + A + [0] * ends
    assert tokenizer.encoded("a").tolist() == [1] * begins + A
    assert tokenizer.encoded("a", begins=False).tolist() == A


def test_settings_say_whether_texts_begin_with_a_token(tmp_path):
    write_folder(tmp_path, changes={"add_bos_token": True})
    assert tokenizer_of_folder(tmp_path).encoded("a").tolist() == [1, *A]
    write_folder(tmp_path, single=[BEGIN, "$A"], changes={"add_bos_token": False})
    assert tokenizer_of_folder(tmp_path).encoded("a").tolist() == A


A = trained()[0].encode("a").ids


def test_templates(folder):
    tokenizer = tokenizer_of_folder(folder)
    text = tokenizer.conversation(MESSAGES)
    assert text == "<|user|>Hello, world<|end|><|assistant|>"
    assert tokenizer.conversation(MESSAGES, answers=False) == "<|user|>Hello, world<|end|>"
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only one message') }}")
    with pytest.raises(InputError, match="refuses the messages .only one message"):
        tokenizer_of_folder(folder).conversation(MESSAGES)
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(InputError, match="refuses the messages"):
        tokenizer_of_folder(folder).conversation(MESSAGES)


def test_what_is_missing_or_damaged(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged or is not a tokenizer's file"):
        tokenizer_of_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.json"):
        tokenizer_of_folder(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        tokenizer_of_folder(folder)


def test_a_folder_without_a_template_or_an_end(tmp_path):
    write_folder(tmp_path, changes={"chat_template": None})
    with pytest.raises(InputError, match="has no chat template"):
        tokenizer_of_folder(tmp_path).conversation(MESSAGES)
    write_folder(tmp_path, changes={"eos_token": None})
    with pytest.raises(InputError, match="no token that ends a text"):
        tokenizer_of_folder(tmp_path)
