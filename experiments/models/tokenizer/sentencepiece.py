"""The tokenizer in a file of SentencePiece, whose pieces have probabilities.

A text is cut into the pieces with the largest product of their probabilities (Kudo, Subword
Regularization, 2018). Source of the format: `sentencepiece_model.proto` of SentencePiece 0.2, and
Protocol Buffers, "Encoding". Of T5's tokens: Raffel et al., Exploring the Limits of Transfer
Learning with a Unified Text-to-Text Transformer, 2020, sections 2.3 and 3.1.4.
"""

import dataclasses
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.common.errors import InputError, needed_module

# What a piece has in place of a space.
SPACE = "▁"
END = "</s>"

# The fields of the messages ModelProto, SentencePiece, TrainerSpec and NormalizerSpec by number.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35
_CHARACTERS = 2

_UNIGRAM = 1
# What a piece is.
NORMAL, UNKNOWN, CONTROL, _USER_DEFINED = 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of text.

    Attributes:
      text: the piece.
      score: the logarithm of its probability.
      kind: what SentencePiece says it is, such as a control token.
    """

    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What a file of SentencePiece holds.

    Attributes:
      source: the file, for errors.
      pieces: the pieces, whose places are the tokens.
      characters: how characters are replaced before a text is cut, in SentencePiece's own form;
        empty if they are not.
    """

    source: Path
    pieces: Sequence[Piece]
    characters: bytes

    @property
    def unknown_id(self) -> int:
        """The token of what no piece fits.

        Raises:
          InputError: there is none.
        """
        found = [place for place, piece in enumerate(self.pieces) if piece.kind == UNKNOWN]
        if not found:
            raise InputError(f"{self.source} has no piece for unknown characters; expected one")
        return found[0]


def read_pieces(path: Path) -> Pieces:
    """Returns what a file of SentencePiece holds.

    Raises:
      InputError: it is damaged, or its pieces have no probabilities.
    """
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in fields if number == _PIECES]
        trainer, normalizer = (
            dict(_fields(b"".join(value for number, value in fields if number == message)))
            for message in (_TRAINER, _NORMALIZER)
        )
    except (ValueError, TypeError, AttributeError, struct.error) as error:
        raise InputError(
            f"{path} is damaged or is not a file of SentencePiece ({error})"
        ) from error
    if not pieces:
        raise InputError(f"{path} has no pieces; expected a file of SentencePiece")
    if trainer.get(_MODEL_TYPE, _UNIGRAM) != _UNIGRAM or trainer.get(_BYTE_FALLBACK, 0):
        raise InputError(
            f"{path} has no probabilities of pieces, or bytes for unknown characters; expected "
            "a file of the kind 'unigram', as T5 has it. transformers writes a tokenizer.json of "
            "others: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return Pieces(path, pieces, normalizer.get(_CHARACTERS, b""))


def tokenizer_of_pieces(found: Pieces, *, sentinels: int) -> Any:
    """Returns a `tokenizers.Tokenizer` that cuts texts into pieces, as T5's does.

    Spaces, tabs and ends of lines are one separator of words, however many there are, and texts end
    with `</s>` where special tokens are asked for.

    Args:
      found: what the file holds.
      sentinels: how many tokens `<extra_id_0>`, `<extra_id_1>`, ... come after the pieces, the last
        one first.
    """
    tokenizers = needed_module("tokenizers", "lora-jax[llm]")
    names = [f"<extra_id_{number}>" for number in reversed(range(sentinels))]
    vocabulary = [(piece.text, piece.score) for piece in found.pieces]
    vocabulary += [(name, 0.0) for name in names]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram(vocabulary, unk_id=found.unknown_id, byte_fallback=False)
    )
    if found.characters:
        tokenizer.normalizer = tokenizers.normalizers.Precompiled(found.characters)
    words = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = words.Sequence(
        [words.WhitespaceSplit(), words.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    special = [piece.text for piece in found.pieces if piece.kind in (UNKNOWN, CONTROL)]
    given = [piece.text for piece in found.pieces if piece.kind == _USER_DEFINED]
    added = tokenizers.AddedToken
    tokenizer.add_special_tokens([added(text, special=True) for text in [*special, *names]])
    tokenizer.add_tokens([added(text, special=False) for text in given])
    end = tokenizer.token_to_id(END)
    if end is None:
        raise InputError(f"{found.source} has no piece {END}; expected one, which ends texts")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$A", END], pair=["$A", END, "$B", END], special_tokens=[(END, end)]
    )
    return tokenizer


def _piece(message: Any) -> Piece:
    fields = dict(_fields(message))
    (score,) = struct.unpack("<f", fields.get(_SCORE, bytes(4)))
    return Piece(fields.get(_TEXT, b"").decode("utf-8"), score, fields.get(_KIND, NORMAL))


_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields number and value of each field: whole numbers, and the bytes of all others."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
        else:
            if kind == _BYTES:
                size, place = _varint(message, place)
            else:
                size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind, len(message))
            value, place = message[place : place + size], place + size
        if place > len(message):
            raise ValueError("a field goes beyond the end")
        yield tag >> 3, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Returns a whole number of seven bits a byte, and the place behind it."""
    number = shift = 0
    while True:
        if place >= len(message):
            raise ValueError("a number goes beyond the end")
        byte = message[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
