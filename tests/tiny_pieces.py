"""A small tokenizer of pieces that was trained on a few words, as T5 has it, and its file."""

import base64
import functools
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SENTINELS = 3
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, hello there: the other world",
    "summarise this dialogue in 12345 words",
]
TEXTS = [
    "hello the world",
    "  two  spaces, and\ta tab\n\nand lines \n",
    "",
    " ",
    "ñandú 漢字 🙂 the",
    "the</s>world </s> the <pad><unk> end",
    "<extra_id_0> quick <extra_id_2>fox<extra_id_1>",
    "the▁other▁ world",
    "no\u00a0break ﬁx ① Ａ e\u0301 THE",
    "x" * 50,
]

# How characters are replaced, as SentencePiece writes it, compressed: no-break spaces, tabs and
# ends of lines become spaces, "①" 1, "ﬁ" fi, "Ａ" A, and e with an accent behind it one character.
CHARACTERS = zlib.decompress(
    base64.b64decode(
        "eNol0wdsl0UYB+DrP0hSEhJElkAUZC+hgDJlyF4yRaYgaqUQpmwcLZQ9y5JNyxCrRdmCC7QOMGXI3sgwKAGU"
        "ocjm+cOXPPndfe97ySV3F7KFEIqEEBsbQo4nQvRLzAqRkJTTP+PUJ0NISY6EVPOIedLTIWQUiITsxmn6LU/U"
        "EnLxFLnJSx7ykw9LQgEKUZBvsiKhsHyWZyj6eAuhGM9RguKUoiRlKE05ylKB8lTkeeKoRBUq8wJVqcaL1KA6"
        "tajJS9SmLnWoTz0a8DKNaEgTGtOMprSgOa1oSWteoS1taE87XqUDr9GRznSiK13oTjd68Dpv0JM36cXbvMU7"
        "xJNAb/rSh37RnjmRMED2ZxADeZfBDGUIwxnGSEYwmlG8z3t8yAckRQ+dsYxhHMlMYDyTmMgUJjONqcxgOinM"
        "ZDazmMscPmIeC5jPIhayhMUsYylppLKC5axiJav5mHQ+4TM+ZQ0ZfMHnrGMtG1jPJjbyJZvZyha+5iu+jd5B"
        "tvEd37OdTH7gJ37kF35mJzuitY0x4Ve5iyz2sJvf2Mt+9nGQAxzmEEc5wnGOcZITnOYUZ/idc5zlD85zgb8L"
        "x4S/5J/RWlZMuCgvcyla4wpX+YfrXONfbnCT/7jF/9zhNve4ywPuP3p7cd5AfELITA8PAVD5jhk="
    )
)

NORMAL, OF_UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
UNIGRAM, PAIRS = 1, 2


@functools.cache
def trained() -> tuple[tuple[str, float], ...]:
    """Returns pieces and the logarithms of their probabilities, special ones first."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=[PAD, END, UNKNOWN],
        unk_token=UNKNOWN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    return tuple((text, score) for text, score in pieces)


def kind(text: str) -> int:
    """Returns what SentencePiece says that a piece is."""
    return {PAD: CONTROL, END: CONTROL, UNKNOWN: OF_UNKNOWN}.get(text, NORMAL)


def write_pieces(
    path: Path,
    pieces: Sequence[tuple[str, float, int]],
    *,
    characters: bytes = CHARACTERS,
    model_type: int = UNIGRAM,
) -> None:
    """Writes a file of SentencePiece: a message of Protocol Buffers."""
    messages = [
        _bytes(1, _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _whole(3, kind))
        for text, score, kind in pieces
    ]
    trainer = _whole(3, model_type) + _whole(4, len(pieces)) + _whole(40, 2)
    normalizer = _bytes(1, b"nmt_nfkc") + _bytes(2, characters)
    path.write_bytes(b"".join([*messages, _bytes(2, trainer), _bytes(3, normalizer)]))


def _varint(number: int) -> bytes:
    digits = []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def _whole(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
