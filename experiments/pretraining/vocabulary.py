"""Pieces of words that are trained on texts, as a tokenizer of T5."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.common.errors import InputError, needed_module
from experiments.models.tokenizer.chat import SETTINGS_FILE, TOKENIZER_FILE
from experiments.models.tokenizer.sentencepiece import (
    CONTROL,
    END,
    NORMAL,
    SPACE,
    UNKNOWN,
    Piece,
    Pieces,
    tokenizer_of_pieces,
)

# Tokens for gaps, as many as T5 has.
SENTINELS = 100
_PADDING, _UNKNOWN = "<pad>", "<unk>"


def write_tokenizer(folder: Path, texts: Iterable[str], size: int) -> None:
    """Trains pieces on texts, and writes their tokenizer with the sentinels into a folder.

    Args:
      folder: the folder, in Hugging Face's format.
      texts: the texts.
      size: how many pieces there are, with those for padding, ends and unknown characters.

    Raises:
      InputError: the texts have fewer pieces, or more characters.
    """
    tokenizer = tokenizer_of_pieces(_trained(texts, size), sentinels=SENTINELS)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    entries = {
        "tokenizer_class": "T5TokenizerFast",
        "pad_token": _PADDING,
        "eos_token": END,
        "unk_token": _UNKNOWN,
        "extra_ids": SENTINELS,
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(entries, indent=2), encoding="utf-8")


def _trained(texts: Iterable[str], size: int) -> Pieces:
    """Returns pieces with probabilities, the first of which are T5's own."""
    tokenizers = needed_module("tokenizers", "lora-jax[llm]")
    words = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = words.Sequence(
        [words.WhitespaceSplit(), words.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    special = {_PADDING: CONTROL, END: CONTROL, _UNKNOWN: UNKNOWN}
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=size, special_tokens=list(special), unk_token=_UNKNOWN, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = json.loads(tokenizer.to_str())["model"]["vocab"]
    if len(found) != size:
        raise InputError(
            f"--vocabulary is {size}, and the texts give {len(found)} pieces; pass that number, or "
            "more --texts"
        )
    pieces = [Piece(text, score, special.get(text, NORMAL)) for text, score in found]
    return Pieces(Path("the texts"), _in_one_order(pieces), b"")


def _in_one_order(pieces: Sequence[Piece]) -> list[Piece]:
    """Returns pieces in the order of their scores, and of their texts where these are alike.

    Training them on the same texts gives the same pieces in another order each time. Characters
    that it would have dropped get the least score and, in that order, a ten-thousandth less each;
    here they all get the least of these.
    """
    first = [piece for piece in pieces if piece.kind != NORMAL]
    normal = [piece for piece in pieces if piece.kind == NORMAL]
    characters = sum(len(piece.text) == 1 for piece in normal)
    least = min(piece.score for piece in normal)
    rare = least + 1e-4 * characters

    def scored(piece: Piece) -> Piece:
        is_rare = len(piece.text) == 1 and piece.score <= rare
        return dataclasses.replace(piece, score=round(least if is_rare else piece.score, 6))

    return [*first, *sorted(map(scored, normal), key=lambda piece: (-piece.score, piece.text))]
