"""Sentences as the tokens that a model was trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.errors import InputError, needed_module
from experiments.data.dataset import Labels, Texts
from experiments.data.tokens import TokenizedTexts
from experiments.models.bert.config import BertConfig


class TextTokenizer:
    """A model's own tokenizer, which truncates sentences to a length."""

    def __init__(self, path: Path, config: BertConfig, *, max_length: int) -> None:
        """Reads a `tokenizer.json`.

        Args:
          path: the file.
          config: that of the model.
          max_length: how many tokens of a sentence are kept, with the two around it.
        """
        if max_length > config.max_position_embeddings:
            raise InputError(
                f"--max-length {max_length} is more than the {config.max_position_embeddings} "
                "positions that the model has; pass at most that"
            )
        self._tokenizer = _read(path)
        _check_ids(path, self._tokenizer, config)
        self._padding_id = config.pad_token_id
        # The file's own settings are those of the program that wrote it, such as padding to 128.
        self._tokenizer.no_padding()
        try:
            self._tokenizer.enable_truncation(max_length)
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(
                f"--max-length {max_length} is refused by the tokenizer ({error})"
            ) from error

    def tokenized(self, texts: Texts) -> TokenizedTexts:
        """Returns the texts as tokens, and how many of them were truncated."""
        return self._tokenized(texts.sentences, texts.labels)

    def unlabelled(self, sentences: Sequence[str]) -> TokenizedTexts:
        """Returns sentences without known classes as tokens; their labels are all 0."""
        return self._tokenized(sentences, np.zeros(len(sentences), np.int32))

    def _tokenized(self, sentences: Sequence[str], labels: Labels) -> TokenizedTexts:
        encodings = self._tokenizer.encode_batch(list(sentences))
        return TokenizedTexts(
            tuple(np.array(encoding.ids, np.int32) for encoding in encodings),
            labels,
            padding_id=self._padding_id,
            truncated=sum(bool(encoding.overflowing) for encoding in encodings),
        )


def _read(path: Path) -> Any:
    tokenizers = needed_module("tokenizers", "lora-jax[text]")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{path} is damaged or is not a tokenizer's file ({error})") from error


def _check_ids(path: Path, tokenizer: Any, config: BertConfig) -> None:
    """Raises if a token has no row in the embedding: JAX would look one up without an error."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= config.vocab_size:
        raise InputError(
            f"{path} has tokens up to {largest}, but the model's vocab_size is "
            f"{config.vocab_size}; expected the tokenizer that belongs to the model"
        )
