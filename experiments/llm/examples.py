"""Examples in files of JSON lines, and as the tokens that a model learns from."""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from experiments.common.errors import InputError
from experiments.models.tokenizer import ChatTokenizer

Message = Mapping[str, str]
Messages = tuple[Message, ...]

_FORMS = "an object with `messages`, or with `prompt` and `completion`"
_PREFERENCES = "an object with `prompt`, `chosen` and `rejected`"
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One example of a file.

    Attributes:
      messages: a conversation that ends with an answer; empty if the example is plain text.
      prompt: plain text that the model is given.
      completion: plain text that it learns to write.
      where: the file and the line, for errors.
    """

    where: str
    messages: Messages = ()
    prompt: str = ""
    completion: str = ""


@dataclass(frozen=True)
class TokenizedExample:
    """The tokens of one example, and which of them the model learns to write."""

    tokens: Int[np.ndarray, " length"]
    learned: Bool[np.ndarray, " length"]

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> "TokenizedExample":
        """Returns the first tokens."""
        return TokenizedExample(self.tokens[:length], self.learned[:length])


@dataclass(frozen=True)
class TokenizedExamples:
    """Examples as tokens, and what became of those that are too long.

    Attributes:
      examples: those that are left.
      cut: how many of them were cut to the greatest length.
      dropped: how many were left out.
    """

    examples: tuple[TokenizedExample, ...]
    cut: int
    dropped: int


@dataclass(frozen=True)
class Preference:
    """Two answers to one question, of which people prefer the first."""

    chosen: Example
    rejected: Example


def read_preferences(path: Path) -> list[Preference]:
    """Returns the preferences of a file of JSON lines, which may be compressed with gzip.

    Raises:
      InputError: there is no such file, it has none, or a line is none; it is numbered.
    """
    found = [_preference(entry, where) for entry, where in read_lines(path)]
    if not found:
        raise InputError(f"{path} has no preferences; expected on each line {_PREFERENCES}")
    return found


def read_examples(path: Path) -> list[Example]:
    """Returns the examples of a file of JSON lines, which may be compressed with gzip.

    Raises:
      InputError: there is no such file, it has no examples, or a line is none; it is numbered.
    """
    examples = [_example(entry, where) for entry, where in read_lines(path)]
    if not examples:
        raise InputError(f"{path} has no examples; expected on each line {_FORMS}")
    return examples


def read_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the object on each line that is not empty, with its place for errors."""
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _object(line, f"{path}, line {number}"), f"{path}, line {number}"
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({error})") from error


def tokenized(
    examples: Sequence[Example],
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    learn_prompts: bool = False,
    drop_long: bool = False,
) -> TokenizedExamples:
    """Returns examples as tokens.

    Args:
      examples: the examples.
      tokenizer: the model's own.
      max_length: how many tokens an example has at most.
      learn_prompts: whether the model learns to write all of a text, and not the answers alone.
      drop_long: whether a longer example is left out instead of cut; one whose answer would be cut
        away is always left out.

    Raises:
      InputError: the chat template refuses a conversation, or no example is left.
    """
    kept: list[TokenizedExample] = []
    cut = dropped = 0
    for example in examples:
        whole = _tokenized(example, tokenizer, learn_prompts=learn_prompts)
        short = whole.cut(max_length)
        if len(whole) > max_length and (drop_long or not short.learned[1:].any()):
            dropped += 1
            continue
        cut += len(whole) > max_length
        kept.append(short)
    if not kept:
        raise InputError(
            f"all {len(examples)} examples are longer than {max_length} tokens; pass a larger "
            "--max-length"
        )
    return TokenizedExamples(tuple(kept), cut, dropped)


def _tokenized(
    example: Example, tokenizer: ChatTokenizer, *, learn_prompts: bool
) -> TokenizedExample:
    if example.messages and learn_prompts:
        parts = [(_text_of(example, tokenizer, example.messages, answers=False), True)]
    elif example.messages:
        parts = _conversation_parts(example, tokenizer)
    else:
        parts = [(example.prompt, False), (example.completion, True)]
    # Each part is tokens of its own, as in use: the model gets a prompt, and writes what follows.
    pieces = [
        (tokenizer.encoded(text, begins=not number and not example.messages), is_answer)
        for number, (text, is_answer) in enumerate(parts)
    ]
    if not example.messages:
        pieces.append((np.array(tokenizer.end_ids[:1], np.int32), True))
    tokens = np.concatenate([ids for ids, _ in pieces])
    learned = np.concatenate(
        [np.full(len(ids), is_answer or learn_prompts) for ids, is_answer in pieces]
    )
    return TokenizedExample(tokens, learned)


def _conversation_parts(example: Example, tokenizer: ChatTokenizer) -> list[tuple[str, bool]]:
    """Returns a conversation's text in parts, and of each whether the model writes it."""
    parts: list[tuple[str, bool]] = []
    done = ""
    for place, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = _text_of(example, tokenizer, example.messages[:place], answers=True)
        after = _text_of(example, tokenizer, example.messages[: place + 1], answers=False)
        if not before.startswith(done) or not after.startswith(before):
            raise InputError(
                f"{example.where}: the chat template changes what is before an answer when it "
                "knows the answer, so that its tokens can't be told apart; pass --learn-prompts"
            )
        parts += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return parts


def _text_of(
    example: Example, tokenizer: ChatTokenizer, messages: Messages, *, answers: bool
) -> str:
    try:
        return tokenizer.conversation(messages, answers=answers)
    except InputError as error:
        raise InputError(f"{example.where}: {error}") from error


def tokenized_pairs(
    preferences: Sequence[Preference],
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    drop_long: bool = False,
) -> TokenizedExamples:
    """Returns preferences as tokens, the chosen and the rejected answer one after the other.

    A pair is left out if one of its answers is.

    Raises:
      InputError: the chat template refuses a conversation, or no pair is left.
    """
    kept: list[TokenizedExample] = []
    cut = dropped = 0
    for preference in preferences:
        pair = [
            _tokenized(each, tokenizer, learn_prompts=False)
            for each in (preference.chosen, preference.rejected)
        ]
        short = [each.cut(max_length) for each in pair]
        is_long = any(len(each) > max_length for each in pair)
        if is_long and (drop_long or not all(each.learned[1:].any() for each in short)):
            dropped += 1
            continue
        cut += is_long
        kept += short
    if not kept:
        raise InputError(
            f"all {len(preferences)} pairs are longer than {max_length} tokens; pass a larger "
            "--max-length"
        )
    return TokenizedExamples(tuple(kept), cut, dropped)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r:.60}; expected {_FORMS}")
    return entry


def _example(entry: Mapping[str, Any], where: str) -> Example:
    if "messages" in entry:
        return Example(where, messages=_messages(entry["messages"], where))
    texts = [entry.get(name) for name in ("prompt", "completion")]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} has the keys {', '.join(entry) or 'none'}; expected {_FORMS}")
    prompt, completion = texts
    if not completion:
        raise InputError(f"{where} has an empty `completion`; expected what the model should write")
    return Example(where, prompt=prompt, completion=completion)


def _preference(entry: Mapping[str, Any], where: str) -> Preference:
    prompt = entry.get("prompt")
    question = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = [entry.get(name) for name in ("chosen", "rejected")]
    if not isinstance(question, list) or not all(isinstance(text, str) for text in answers):
        raise InputError(
            f"{where} has the keys {', '.join(entry) or 'none'}; expected {_PREFERENCES}, the "
            "first of them text or a list of messages"
        )
    chosen, rejected = (
        Example(where, messages=_messages([*question, _answer(text)], where)) for text in answers
    )
    return Preference(chosen, rejected)


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _messages(found: Any, where: str) -> Messages:
    if not isinstance(found, list) or not found:
        raise InputError(f"{where}: `messages` is {found!r:.60}; expected a list of messages")
    for message in found:
        is_message = isinstance(message, dict) and all(
            isinstance(message.get(name), str) for name in ("role", "content")
        )
        if not is_message or message["role"] not in _ROLES:
            raise InputError(
                f"{where}: a message is {message!r:.60}; expected a `content` and a `role` of "
                f"{', '.join(_ROLES)}"
            )
    if found[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: the last message is of {found[-1]['role']!r}; expected an answer of "
            "'assistant' at the end"
        )
    return tuple(found)
