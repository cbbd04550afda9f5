"""Examples and prompts as the tokens that a model reads and learns to write.

A model that continues texts has a prompt and its answer in one text. An encoder-decoder reads the
prompt, its source, and writes the answer as a text of its own.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from experiments.common.errors import InputError
from experiments.llm.examples import Example, Messages, Preference
from experiments.models.pretrained import LanguageModel
from experiments.models.t5 import T5Config
from experiments.models.tokenizer import ChatTokenizer, Message


@dataclass(frozen=True)
class TokenizedExample:
    """The tokens of one example, and which of them the model learns to write.

    Attributes:
      tokens: the text that is learned, or a part of it.
      learned: which of its tokens are.
      source: what an encoder reads before; None for a model without one.
    """

    tokens: Int[np.ndarray, " length"]
    learned: Bool[np.ndarray, " length"]
    source: Int[np.ndarray, " source"] | None = None

    def __len__(self) -> int:
        """How many tokens a row has room for if it has room for this example."""
        return max(len(self.tokens), self._source_count)

    @property
    def count(self) -> int:
        """How many tokens there are, those of the source included."""
        return len(self.tokens) + self._source_count

    @property
    def _source_count(self) -> int:
        return 0 if self.source is None else len(self.source)

    def cut(self, length: int) -> "TokenizedExample":
        """Returns the first tokens; the last one of a source, which ends it, stays."""
        source = self.source
        if source is not None and len(source) > length:
            source = np.append(source[: length - 1], source[-1])
        return TokenizedExample(self.tokens[:length], self.learned[:length], source)


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


class Texts(abc.ABC):
    """How a model reads examples and prompts.

    Attributes:
      tokenizer: the model's own.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer

    @abc.abstractmethod
    def question(self, messages: Sequence[Message]) -> Int[np.ndarray, " length"]:
        """Returns messages as the tokens that an answer follows.

        Raises:
          InputError: the chat template refuses them.
        """

    @abc.abstractmethod
    def prompt(self, text: str) -> Int[np.ndarray, " length"]:
        """Returns a plain text as the tokens that its completion follows."""

    @abc.abstractmethod
    def example(self, example: Example, *, learn_prompts: bool = False) -> TokenizedExample:
        """Returns an example as tokens.

        Args:
          example: the example.
          learn_prompts: whether the model learns to write all of a text, and not the answers alone.

        Raises:
          InputError: the chat template refuses a conversation, or there is no such text.
        """


class ContinuedTexts(Texts):
    """Texts that a model continues: a conversation, or a prompt and its completion."""

    def question(self, messages: Sequence[Message]) -> Int[np.ndarray, " length"]:
        return self.tokenizer.encoded_conversation(messages)

    def prompt(self, text: str) -> Int[np.ndarray, " length"]:
        return self.tokenizer.encoded(text)

    def example(self, example: Example, *, learn_prompts: bool = False) -> TokenizedExample:
        if example.messages and learn_prompts:
            parts = [(self._text(example, example.messages, answers=False), True)]
        elif example.messages:
            parts = self._parts(example)
        else:
            parts = [(example.prompt, False), (example.completion, True)]
        # Each part is tokens of its own, as in use: the model gets a prompt, and writes what
        # follows.
        pieces = [
            (self.tokenizer.encoded(text, begins=not number and not example.messages), is_answer)
            for number, (text, is_answer) in enumerate(parts)
        ]
        if not example.messages:
            pieces.append((np.array(self.tokenizer.end_ids[:1], np.int32), True))
        tokens = np.concatenate([ids for ids, _ in pieces])
        learned = np.concatenate(
            [np.full(len(ids), is_answer or learn_prompts) for ids, is_answer in pieces]
        )
        return TokenizedExample(tokens, learned)

    def _parts(self, example: Example) -> list[tuple[str, bool]]:
        """Returns a conversation's text in parts, and of each whether the model writes it."""
        parts: list[tuple[str, bool]] = []
        done = ""
        for place, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            before = self._text(example, example.messages[:place], answers=True)
            after = self._text(example, example.messages[: place + 1], answers=False)
            if not before.startswith(done) or not after.startswith(before):
                raise InputError(
                    f"{example.where}: the chat template changes what is before an answer when it "
                    "knows the answer, so that its tokens can't be told apart; pass --learn-prompts"
                )
            parts += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return parts

    def _text(self, example: Example, messages: Messages, *, answers: bool) -> str:
        try:
            return self.tokenizer.conversation(messages, answers=answers)
        except InputError as error:
            raise InputError(f"{example.where}: {error}") from error


class AnsweredTexts(Texts):
    """Texts that an encoder reads, and the answers that a decoder writes.

    A conversation is its messages, a line each, where there is no chat template; its last answer is
    learned.
    """

    def __init__(self, tokenizer: ChatTokenizer, start: int) -> None:
        """Keeps the tokenizer, and the token with which the decoder begins."""
        super().__init__(tokenizer)
        self._start = start

    def question(self, messages: Sequence[Message]) -> Int[np.ndarray, " length"]:
        if not self.tokenizer.has_template:
            return self.prompt("\n".join(message["content"] for message in messages))
        text = self.tokenizer.conversation(messages)
        return self.tokenizer.encoded(text, begins=False, ends=True)

    def prompt(self, text: str) -> Int[np.ndarray, " length"]:
        return self.tokenizer.encoded(text, ends=True)

    def example(self, example: Example, *, learn_prompts: bool = False) -> TokenizedExample:
        if learn_prompts:
            raise InputError(
                "--learn-prompts goes with a model that continues texts; an encoder-decoder writes "
                "answers alone"
            )
        if example.messages:
            *asked, last = example.messages
            source, answer = self.question(asked), last["content"]
        else:
            source, answer = self.prompt(example.prompt), example.completion
        written = self.tokenizer.encoded(answer, begins=False)
        tokens = np.array([self._start, *written, self.tokenizer.end_ids[0]], np.int32)
        return TokenizedExample(tokens, np.arange(len(tokens)) > 0, source)


def texts_of(model: LanguageModel) -> Texts:
    """Returns how a model reads texts.

    Raises:
      InputError: it has no tokenizer, or one of another model.
    """
    if isinstance(model.config, T5Config):
        return AnsweredTexts(model.tokenizer(), model.config.decoder_start_token_id)
    return ContinuedTexts(model.tokenizer())


def tokenized(
    examples: Sequence[Example],
    texts: Texts,
    *,
    max_length: int,
    learn_prompts: bool = False,
    drop_long: bool = False,
) -> TokenizedExamples:
    """Returns examples as tokens.

    Args:
      examples: the examples.
      texts: how the model reads them.
      max_length: how many tokens an example has at most.
      learn_prompts: whether the model learns to write all of a text, and not the answers alone.
      drop_long: whether a longer example is left out instead of cut; one whose answer would be cut
        away is always left out.

    Raises:
      InputError: the chat template refuses a conversation, or no example is left.
    """
    units = [(texts.example(each, learn_prompts=learn_prompts),) for each in examples]
    return _within(units, max_length, drop_long=drop_long, named="examples")


def tokenized_pairs(
    preferences: Sequence[Preference], texts: Texts, *, max_length: int, drop_long: bool = False
) -> TokenizedExamples:
    """Returns preferences as tokens, the chosen and the rejected answer one after the other.

    A pair is left out if one of its answers is.

    Raises:
      InputError: the chat template refuses a conversation, or no pair is left.
    """
    pairs = [(texts.example(each.chosen), texts.example(each.rejected)) for each in preferences]
    return _within(pairs, max_length, drop_long=drop_long, named="pairs")


def _within(
    units: Sequence[tuple[TokenizedExample, ...]],
    max_length: int,
    *,
    drop_long: bool,
    named: str,
) -> TokenizedExamples:
    """Returns the examples of units that are cut, or left out, as a whole."""
    kept: list[TokenizedExample] = []
    cut = dropped = 0
    for unit in units:
        short = [each.cut(max_length) for each in unit]
        is_long = any(len(each) > max_length for each in unit)
        if is_long and (drop_long or not all(each.learned[1:].any() for each in short)):
            dropped += 1
            continue
        cut += is_long
        kept += short
    if not kept:
        raise InputError(
            f"all {len(units)} {named} are longer than {max_length} tokens; pass a larger "
            "--max-length"
        )
    return TokenizedExamples(tuple(kept), cut, dropped)
