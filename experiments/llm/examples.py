"""Examples in files of JSON lines."""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.errors import InputError

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
