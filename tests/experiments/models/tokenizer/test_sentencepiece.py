"""Tokenizers whose pieces have probabilities, as T5 has them: in a folder and in their own file."""

import io
import json

import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.models.tokenizer import tokenizer_of_folder
from experiments.models.tokenizer.sentencepiece import read_pieces, tokenizer_of_pieces
from tests import tiny_pieces
from tests.tiny_pieces import CORPUS, SENTINELS, TEXTS, kind, write_pieces

tokenizers = pytest.importorskip("tokenizers")


def pieces():
    """Returns the pieces as a file has them."""
    return [(text, score, kind(text)) for text, score in tiny_pieces.trained()]


def write_file(folder, **options):
    write_pieces(folder / "spiece.model", pieces(), **options)
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": SENTINELS}))


def theirs():
    """Returns the tokenizer of transformers, whose last sentinel has the first token of them."""
    transformers = pytest.importorskip("transformers")
    sentinels = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(SENTINELS))]
    return transformers.T5Tokenizer(
        vocab=[*tiny_pieces.trained(), *sentinels],
        _spm_precompiled_charsmap=tiny_pieces.CHARACTERS,
        extra_ids=SENTINELS,
    )


@pytest.mark.parametrize("written", ["tokenizer.json", "spiece.model"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers(tmp_path, written, text):
    other = theirs()
    if written == "tokenizer.json":
        other.save_pretrained(tmp_path)
    else:
        write_file(tmp_path)
    assert (tmp_path / written).is_file()
    own = tokenizer_of_folder(tmp_path)
    expected = other(text)["input_ids"]
    assert own.encoded(text, ends=True).tolist() == expected
    assert own.encoded(text).tolist() == expected[:-1]
    assert own.decoded(expected) == other.decode(expected, skip_special_tokens=True)
    assert own.end_ids == (1,)
    assert own.largest_id == len(other) - 1 == len(pieces()) + SENTINELS - 1


def test_a_folder_with_both_files_has_one_tokenizer(tmp_path):
    write_file(tmp_path)
    before = tokenizer_of_folder(tmp_path)
    built = tokenizer_of_pieces(read_pieces(tmp_path / "spiece.model"), sentinels=SENTINELS)
    built.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    after = tokenizer_of_folder(tmp_path)
    for text in TEXTS:
        np.testing.assert_array_equal(
            before.encoded(text, ends=True), after.encoded(text, ends=True)
        )
    names = {file.name for file in after.files(tmp_path)}
    assert names == {"tokenizer.json", "spiece.model", "tokenizer_config.json"}


def test_a_file_without_settings_has_a_hundred_sentinels(tmp_path):
    write_pieces(tmp_path / "spiece.model", pieces())
    tokenizer = tokenizer_of_folder(tmp_path)
    assert tokenizer.largest_id == len(pieces()) + 99
    assert tokenizer.encoded("<extra_id_0>").tolist() == [tokenizer.largest_id]
    assert tokenizer.encoded("<extra_id_99>").tolist() == [len(pieces())]


def test_pieces_that_users_defined_are_taken_whole(tmp_path):
    path = tmp_path / "spiece.model"
    write_pieces(path, [*pieces(), ("[sep]", 0.0, tiny_pieces.USER_DEFINED)])
    tokenizer = tokenizer_of_folder(tmp_path)
    found = tokenizer.encoded("the[sep]world")
    assert len(pieces()) in found
    assert "[sep]" in tokenizer.decoded(found)


def test_tokens_are_those_of_sentencepiece(tmp_path):
    """Of a file that it trained itself, with its own normalisation of characters."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS * 20), encoding="utf-8")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_writer=written,
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(written.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))
    own = tokenizer_of_folder(tmp_path)
    other = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    # It reads special tokens in a text as letters.
    for text in (each for each in TEXTS if "<" not in each):
        expected = other.encode(text)
        assert own.encoded(text).tolist() == expected, text
        if 2 not in expected:
            assert own.decoded(expected) == other.decode(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:100], "is damaged or is not a file of SentencePiece"),
        (lambda content: b"{}" + content, "is damaged or is not a file of SentencePiece"),
        (lambda content: b"\x00\xff" * 40, "is damaged or is not a file of SentencePiece"),
        (lambda content: b"", "has no pieces"),
    ],
)
def test_files_that_are_damaged(tmp_path, change, message):
    path = tmp_path / "spiece.model"
    write_file(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        tokenizer_of_folder(tmp_path)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "spiece.model"
    write_pieces(path, pieces(), model_type=tiny_pieces.PAIRS)
    with pytest.raises(InputError, match="expected a file of the kind 'unigram'"):
        tokenizer_of_folder(tmp_path)
    write_pieces(path, [each for each in pieces() if each[0] != "<unk>"])
    with pytest.raises(InputError, match="has no piece for unknown characters"):
        tokenizer_of_folder(tmp_path)
    write_pieces(path, [each for each in pieces() if each[0] != "</s>"])
    with pytest.raises(InputError, match="has no piece </s>"):
        tokenizer_of_folder(tmp_path)
