"""The tokenizer in a folder of Hugging Face's format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.common.errors import InputError, needed_module
from experiments.models.tokenizer.chat import (
    PIECES_FILE,
    SETTINGS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    ChatTokenizer,
)
from experiments.models.tokenizer.sentencepiece import END, read_pieces, tokenizer_of_pieces


def tokenizer_of_folder(folder: Path) -> ChatTokenizer:
    """Returns the tokenizer of a Hugging Face folder.

    Raises:
      InputError: a file is missing or damaged; it is named.
    """
    settings = _json_object(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    tokenizer = _tokenizer(folder, settings)
    begin, end = (_token(settings.get(name)) for name in ("bos_token", "eos_token"))
    if end is None and not (folder / TOKENIZER_FILE).is_file():
        end = END
    text = tokenizer.encode("a", add_special_tokens=True)
    # What the tokenizer itself puts before a text, and behind it.
    first, last = (
        text.tokens[place] if text.special_tokens_mask[place] else None for place in (0, -1)
    )
    begins = settings.get("add_bos_token", first == begin)
    return ChatTokenizer(
        tokenizer,
        str(folder),
        template=_template(folder, settings),
        begin=begin,
        end=end,
        begins_texts=begin is not None and bool(begins),
        ends_texts=end is not None and last == end,
    )


def _tokenizer(folder: Path, settings: Mapping[str, Any]) -> Any:
    tokenizers = needed_module("tokenizers", "lora-jax[llm]")
    path, pieces = folder / TOKENIZER_FILE, folder / PIECES_FILE
    if not path.is_file() and pieces.is_file():
        return tokenizer_of_pieces(read_pieces(pieces), sentinels=settings.get("extra_ids", 100))
    if not path.is_file():
        raise InputError(
            f"{folder} has no {path.name}; transformers writes it: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{path} is damaged or is not a tokenizer's file ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    own = settings.get("chat_template")
    # Several templates, such as one for calls of tools, each with a name.
    named = {each["name"]: each["template"] for each in own} if isinstance(own, list) else {}
    return named.get("default") if named else own


def _token(entry: Any) -> str | None:
    return entry["content"] if isinstance(entry, Mapping) else entry


def _json_object(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a tokenizer's settings: expected a JSON object")
    return content
