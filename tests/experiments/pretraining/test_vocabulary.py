"""The vocabulary that is trained on texts: what it holds, and that it is the same each time."""

import pytest

from experiments.common.errors import InputError
from experiments.models.tokenizer import tokenizer_of_folder
from experiments.pretraining.vocabulary import SENTINELS, write_tokenizer

pytest.importorskip("tokenizers")

TEXTS = ["the dog sees the cat", "a cat and a dog", "dogs, cats & co.", "ändern Sie das: 42!"] * 3
SIZE = 31


def written(folder):
    folder.mkdir()
    write_tokenizer(folder, TEXTS, SIZE)
    return (folder / "tokenizer.json").read_bytes()


def test_texts_are_the_same_when_they_come_back(tmp_path):
    written(tmp_path / "one")
    tokenizer = tokenizer_of_folder(tmp_path / "one")
    for text in TEXTS:
        tokens = tokenizer.encoded(text, ends=True)
        assert tokens[-1] == tokenizer.end_ids[0]
        assert tokenizer.decoded(tokens) == text
    assert tokenizer.largest_id == SIZE + SENTINELS - 1
    assert not tokenizer.has_template


def test_training_again_gives_the_same_file(tmp_path):
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_more_pieces_than_there_are(tmp_path):
    with pytest.raises(InputError, match="--vocabulary is 900, and the texts give"):
        write_tokenizer(tmp_path, TEXTS, 900)
