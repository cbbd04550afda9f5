"""Tokenizers in the metadata of GGUF files."""

import itertools

import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.models.tokenizer import gguf_file, tokenizer_of_folder, tokenizer_of_gguf
from tests.tiny_tokenizer import SPECIAL, TEMPLATE, TEXTS, trained, write_folder

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

MESSAGES = [{"role": "user", "content": "Hello, world"}]


def metadata(**changes):
    _, tokens, merges = trained()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if each in SPECIAL else 1 for each in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
        **changes,
    }


def test_a_gguf_file_has_the_same_tokenizer(tmp_path):
    write_folder(tmp_path)
    of_folder, of_file = tokenizer_of_folder(tmp_path), tokenizer_of_gguf(tmp_path, metadata())
    for text in TEXTS:
        np.testing.assert_array_equal(of_folder.encoded(text), of_file.encoded(text))
    for messages in (MESSAGES, MESSAGES * 3):
        np.testing.assert_array_equal(
            of_folder.encoded_conversation(messages), of_file.encoded_conversation(messages)
        )


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        ("gpt-2", "a1234 b", ["a", "1234", " b"]),
        ("smollm", "a1234 b", ["a", "1", "2", "3", "4", " b"]),
        ("llama-bpe", "a1234 b\n", ["a", "123", "4", " b", "\n"]),
        ("qwen2", "(a1234 b\n", ["(a", "1", "2", "3", "4", " b", "\n"]),
    ],
)
def test_how_texts_are_cut_into_words(words, text, expected):
    _, tokens, merges = trained()
    cut = gguf_file._byte_level(tokens, merges, words).pre_tokenizer.pre_tokenize_str(text)
    found = [text[start:stop] for _, (start, stop) in cut]
    assert found == expected


def test_the_first_token_of_a_text(tmp_path):
    assert tokenizer_of_gguf(tmp_path, metadata()).encoded("a").size == 1
    beginning = tokenizer_of_gguf(tmp_path, metadata(**{"tokenizer.ggml.add_bos_token": True}))
    assert beginning.encoded("a")[0] == 1
    # A template writes it itself.
    assert beginning.encoded_conversation(MESSAGES)[0] != 1


PIECES = [
    "▁",
    "h",
    "e",
    "l",
    "o",
    "w",
    "r",
    "d",
    "he",
    "ll",
    "lo",
    "▁he",
    "▁hell",
    "▁wor",
    "wo",
    "rd",
]


def pieces_metadata(**changes):
    """Returns the metadata of a tokenizer of pieces, whose later ones have lower scores."""
    random = np.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    scores = [0.0] * 259 + random.permutation(len(PIECES)).tolist()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }


def merged_by_score(text, tokens, scores):
    """Returns tokens as SentencePiece makes them: the best pair first, until there is none."""
    of_token = dict(zip(tokens, scores, strict=True))
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [
            (of_token.get(a + b, -np.inf), -n) for n, (a, b) in enumerate(itertools.pairwise(parts))
        ]
        best, place = max(joined, default=(-np.inf, 0))
        if best == -np.inf:
            break
        parts[-place : 2 - place] = [parts[-place] + parts[1 - place]]
    return [
        piece
        for part in parts
        for piece in ([part] if part in of_token else [f"<0x{b:02X}>" for b in part.encode()])
    ]


def test_pieces_are_merged_by_their_scores(tmp_path):
    found = pieces_metadata()
    tokenizer = tokenizer_of_gguf(tmp_path, found)
    tokens, scores = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]
    random = np.random.default_rng(1)
    texts = [
        "hello world",
        "hellä 漢",
        "",
        *("".join(random.choice(list("helo wrd"), 12)) for _ in range(40)),
    ]
    for text in texts:
        ids = tokenizer.encoded(text)
        assert ids[0] == 1
        expected = merged_by_score(text, tokens, scores) if text else []
        assert [tokens[each] for each in ids[1:]] == expected
        assert tokenizer.decoded(ids) == text
    bare = pieces_metadata(**{"tokenizer.ggml.add_space_prefix": False})
    assert tokens[tokenizer_of_gguf(tmp_path, bare).encoded("he")[1]] == "he"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "a tokenizer of the kind 't5'"),
        ({"tokenizer.ggml.pre": "other"}, "cuts words as 'other'"),
        ({"tokenizer.ggml.eos_token_id": None}, "no token that ends a text"),
    ],
)
def test_tokenizers_that_are_not_read(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        tokenizer_of_gguf(tmp_path, metadata(**changes))


def test_what_is_missing(tmp_path):
    found = metadata()
    del found["tokenizer.ggml.merges"], found["tokenizer.chat_template"]
    with pytest.raises(InputError, match=r"has no tokenizer.ggml.merges"):
        tokenizer_of_gguf(tmp_path, found)
    found = metadata(**{"tokenizer.chat_template": None})
    with pytest.raises(InputError, match="has no chat template"):
        tokenizer_of_gguf(tmp_path, found).conversation(MESSAGES)
