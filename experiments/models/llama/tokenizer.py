"""Texts and conversations as the tokens that a model was trained on."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.common.errors import InputError, needed_module

Message = Mapping[str, Any]

_TOKENIZER_FILE = "tokenizer.json"
_TEMPLATE_FILE = "chat_template.jinja"
_SETTINGS_FILE = "tokenizer_config.json"
# What GGUF says a token is.
_CONTROL, _USER_DEFINED = 3, 4
# A space, and what is not known, among the pieces of SentencePiece.
_SPACE, _UNKNOWN = "▁", "<unk>"

# How texts are cut into words before tokens are made of them, by GGUF's name.
_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_WORDS_OF_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_WORDS_OF_LLAMA3 = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS_OF_QWEN2 = _WORDS_OF_LLAMA3.replace("{1,3}", "")
_WORDS: Mapping[str, str] = {
    "default": _WORDS_OF_GPT2,
    "gpt-2": _WORDS_OF_GPT2,
    "smollm": _WORDS_OF_GPT2,
    "llama-bpe": _WORDS_OF_LLAMA3,
    "llama3": _WORDS_OF_LLAMA3,
    "qwen2": _WORDS_OF_QWEN2,
}
_EACH_DIGIT = ("smollm",)
_NORMALISED = ("qwen2",)


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
    ) -> None:
        """Keeps what a folder or a file holds.

        Args:
          tokenizer: a `tokenizers.Tokenizer`.
          source: where it is from, for errors.
          template: the chat template, if there is one.
          begin: the token at the beginning of texts, if there is one.
          end: the token at the end of texts.
          begins_texts: whether `encoded` puts the first token before a text.
        """
        self._tokenizer, self._source, self._template = tokenizer, source, template
        self._begin, self._end, self._begins_texts = begin, end, begins_texts
        found = tokenizer.token_to_id(end) if end else None
        if found is None:
            raise InputError(f"{source} has no token that ends a text; expected an eos token")
        self.end_ids: tuple[int, ...] = (found,)
        self.padding_id = found

    @property
    def largest_id(self) -> int:
        """The largest token, which the model's embedding must have a row for."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def files(self, folder: Path) -> list[Path]:
        """Writes the files of a tokenizer in Hugging Face's format into a folder, and returns them.

        Where the tokenizer comes from such a folder, they are its own.
        """
        source = Path(self._source)
        if source.is_dir():
            names = (_TOKENIZER_FILE, _SETTINGS_FILE, _TEMPLATE_FILE)
            return [source / name for name in names if (source / name).is_file()]
        tokenizer, settings = folder / _TOKENIZER_FILE, folder / _SETTINGS_FILE
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

    def encoded(self, text: str, *, begins: bool = True) -> Int[np.ndarray, "length"]:
        """Returns a text as tokens; special tokens in it become what they say.

        Args:
          text: the text.
          begins: whether it gets the token that begins texts, if the model has one.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not begins or not self._begins_texts:
            return np.array(ids, np.int32)
        return np.array([self._tokenizer.token_to_id(self._begin), *ids], np.int32)

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
        jinja2, sandbox = needed_module("jinja2", "llm"), needed_module("jinja2.sandbox", "llm")

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
    ) -> Int[np.ndarray, "length"]:
        """Returns messages as tokens; the template itself writes the first one."""
        return self.encoded(self.conversation(messages, answers=answers), begins=False)


def tokenizer_of_folder(folder: Path) -> ChatTokenizer:
    """Returns the tokenizer of a Hugging Face folder.

    Raises:
      InputError: a file is missing or damaged; it is named.
    """
    tokenizers = needed_module("tokenizers", "llm")
    path = folder / _TOKENIZER_FILE
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
    settings = _json_object(folder / _SETTINGS_FILE) if (folder / _SETTINGS_FILE).is_file() else {}
    begin, end = (_token(settings.get(name)) for name in ("bos_token", "eos_token"))
    begins = bool(settings.get("add_bos_token", _begins_texts(tokenizer, begin)))
    return ChatTokenizer(
        tokenizer,
        str(folder),
        template=_template(folder, settings),
        begin=begin,
        end=end,
        begins_texts=begins and begin is not None,
    )


def tokenizer_of_gguf(path: Path, metadata: Mapping[str, Any]) -> ChatTokenizer:
    """Returns the tokenizer in the metadata of a GGUF file.

    Raises:
      InputError: it is of a kind that is not read, or lacks something; that is named.
    """
    tokens = _needed(path, metadata, "tokenizer.ggml.tokens")
    kind, words = (metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind == "llama":
        scores = _needed(path, metadata, "tokenizer.ggml.scores")
        begins = metadata.get("tokenizer.ggml.add_space_prefix", True)
        tokenizer = _of_pieces(tokens, scores, begins_with_space=begins)
    elif kind == "gpt2" and words in _WORDS:
        tokenizer = _byte_level(tokens, _needed(path, metadata, "tokenizer.ggml.merges"), words)
    else:
        raise InputError(
            f"{path} has a tokenizer of the kind {kind!r}, which cuts words as {words!r}; expected "
            f"'llama', or 'gpt2' and one of {', '.join(_WORDS)}. Pass the model's folder in "
            "Hugging Face's format"
        )
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    _add_special(tokenizer, tokens, types)

    def token(name: str) -> str | None:
        place = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if place is None else tokens[place]

    begin = token("bos")
    return ChatTokenizer(
        tokenizer,
        str(path),
        template=metadata.get("tokenizer.chat_template"),
        begin=begin,
        end=token("eos"),
        begins_texts=begin is not None
        and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"),
    )


def _byte_level(tokens: Sequence[str], merges: Sequence[str], words: str) -> Any:
    """Returns a tokenizer that merges pairs of bytes (Radford et al., GPT-2, 2019)."""
    tokenizers = needed_module("tokenizers", "llm")
    vocabulary = {token: place for place, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, pairs, ignore_merges=words == "llama-bpe")
    )
    parts = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS[words]), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    if words in _EACH_DIGIT:
        parts.insert(0, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    if words in _NORMALISED:
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _of_pieces(tokens: Sequence[str], scores: Sequence[float], *, begins_with_space: bool) -> Any:
    """Returns a tokenizer that merges the pair of the best score, and falls back to bytes.

    Source: Kudo and Richardson, SentencePiece, 2018; the kind of Llama, Llama 2 and Mistral.
    """
    tokenizers = needed_module("tokenizers", "llm")
    vocabulary = {token: place for place, token in enumerate(tokens)}
    of_token = dict(zip(tokens, scores, strict=True))
    pairs = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    pairs.sort(key=lambda pair: -of_token[pair[0] + pair[1]])
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, pairs, unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True
        )
    )
    parts = [tokenizers.normalizers.Replace(" ", _SPACE)]
    decoders = [
        tokenizers.decoders.Replace(_SPACE, " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    if begins_with_space:
        parts.insert(0, tokenizers.normalizers.Prepend(_SPACE))
        decoders.append(tokenizers.decoders.Strip(content=" ", left=1))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(parts)
    tokenizer.decoder = tokenizers.decoders.Sequence(decoders)
    return tokenizer


def _add_special(tokenizer: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    tokenizers = needed_module("tokenizers", "llm")
    of_type = list(zip(tokens, types, strict=True))
    control = [token for token, kind in of_type if kind == _CONTROL]
    given = [token for token, kind in of_type if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in control])
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=False) for token in given])


def _begins_texts(tokenizer: Any, begin: str | None) -> bool:
    """Says whether a tokenizer's own post-processor puts the first token before a text."""
    first = tokenizer.encode("", add_special_tokens=True).ids[:1]
    return begin is not None and first == [tokenizer.token_to_id(begin)]


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / _TEMPLATE_FILE
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


def _needed(path: Path, metadata: Mapping[str, Any], name: str) -> Any:
    if name not in metadata:
        raise InputError(f"{path} has no {name}; expected a model with its tokenizer")
    return metadata[name]


def _as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
