"""Texts and conversations as the tokens that a model was trained on."""

import copy
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.common.errors import InputError, needed_module

Message = Mapping[str, Any]

# In a folder of Hugging Face's format; some have their tokenizer as SentencePiece wrote it alone.
TOKENIZER_FILE = "tokenizer.json"
PIECES_FILE = "spiece.model"
TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"


class ChatTokenizer:
    """A model's own tokenizer and chat template.

    Attributes:
      end_ids: the tokens that end an answer.
      padding_id: a token to fill rows with.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: str,
        *,
        template: str | None,
        begin: str | None,
        end: str | None,
        begins_texts: bool,
        ends_texts: bool = False,
    ) -> None:
        """Keeps what a folder or a file holds.

        Args:
          tokenizer: a `tokenizers.Tokenizer`.
          source: where it is from, for errors.
          template: the chat template, if there is one.
          begin: the token at the beginning of texts, if there is one.
          end: the token at the end of texts.
          begins_texts: whether `encoded` puts the first token before a text.
          ends_texts: whether it can put the last one behind it.
        """
        self._tokenizer, self._source, self._template = tokenizer, source, template
        self._begin, self._end = begin, end
        self._begins_texts, self._ends_texts = begins_texts, ends_texts
        self._is_changed = False
        found = tokenizer.token_to_id(end) if end else None
        if found is None:
            raise InputError(f"{source} has no token that ends a text; expected an eos token")
        self.end_ids: tuple[int, ...] = (found,)
        self.padding_id = found

    def with_tokens(self, texts: Sequence[str]) -> "ChatTokenizer":
        """Returns the tokenizer with these texts as tokens of their own."""
        tokenizer = type(self._tokenizer).from_str(self._tokenizer.to_str())
        tokenizer.add_tokens(list(texts))
        changed = copy.copy(self)
        changed._tokenizer, changed._is_changed = tokenizer, True
        return changed

    def id_of(self, text: str) -> int | None:
        """Returns the token that is this text, if there is one."""
        found: int | None = self._tokenizer.token_to_id(text)
        return found

    @property
    def has_template(self) -> bool:
        """Whether it has a chat template."""
        return self._template is not None

    @property
    def largest_id(self) -> int:
        """The largest token, which the model's embedding must have a row for."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def files(self, folder: Path) -> list[Path]:
        """Writes the files of a tokenizer in Hugging Face's format into a folder, and returns them.

        Where the tokenizer comes from such a folder, they are its own, unless tokens were added.
        """
        source = Path(self._source)
        tokenizer, settings = folder / TOKENIZER_FILE, folder / SETTINGS_FILE
        if source.is_dir():
            kept = (SETTINGS_FILE, TEMPLATE_FILE)
            names = kept if self._is_changed else (TOKENIZER_FILE, PIECES_FILE, *kept)
            found = [source / name for name in names if (source / name).is_file()]
            if not self._is_changed:
                return found
            self._tokenizer.save(str(tokenizer))
            return [tokenizer, *found]
        self._tokenizer.save(str(tokenizer))
        entries = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": self._template,
            "bos_token": self._begin,
            "eos_token": self._end,
            "add_bos_token": self._begins_texts,
        }
        settings.write_text(json.dumps(entries, indent=2), encoding="utf-8")
        return [tokenizer, settings]

    def encoded(
        self, text: str, *, begins: bool = True, ends: bool = False
    ) -> Int[np.ndarray, " length"]:
        """Returns a text as tokens; special tokens in it become what they say.

        Args:
          text: the text.
          begins: whether it gets the token that begins texts, if the model has one.
          ends: whether it gets the token that ends texts, if the model reads one there, as an
            encoder may.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if begins and self._begins_texts:
            ids.insert(0, self._tokenizer.token_to_id(self._begin))
        if ends and self._ends_texts:
            ids.append(self.end_ids[0])
        return np.array(ids, np.int32)

    def decoded(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, without special ones."""
        text: str = self._tokenizer.decode([int(each) for each in ids], skip_special_tokens=True)
        return text

    def conversation(self, messages: Sequence[Message], *, answers: bool = True) -> str:
        """Returns messages as the text that the model was trained on.

        Args:
          messages: each with a `role` and a `content`.
          answers: whether the text ends where the model's answer begins.

        Raises:
          InputError: there is no template, or it refuses these messages.
        """
        if self._template is None:
            raise InputError(f"{self._source} has no chat template; expected a chat model")
        jinja2, sandbox = (
            needed_module("jinja2", "lora-jax[llm]"),
            needed_module("jinja2.sandbox", "lora-jax[llm]"),
        )

        def refuse(message: str) -> None:
            raise jinja2.exceptions.TemplateError(message)

        # A template is a program in a file from somewhere: it sees nothing but these names.
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _as_json
        environment.globals |= {"raise_exception": refuse, "strftime_now": _now}
        try:
            text: str = environment.from_string(self._template).render(
                messages=list(messages),
                add_generation_prompt=answers,
                bos_token=self._begin or "",
                eos_token=self._end or "",
            )
        except jinja2.exceptions.TemplateError as error:
            raise InputError(
                f"the chat template of {self._source} refuses the messages ({error})"
            ) from error
        return text

    def encoded_conversation(
        self, messages: Sequence[Message], *, answers: bool = True
    ) -> Int[np.ndarray, " length"]:
        """Returns messages as tokens; the template itself writes the first one."""
        return self.encoded(self.conversation(messages, answers=answers), begins=False)


def _as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
