"""A conversation on the terminal: the command line of `llm_lora chat`."""

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp

import lora_jax
from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.common.options import Option, parsed_as, positive_int
from experiments.common.programs import keep_programs
from experiments.llm.answers import Writer, filled_up
from experiments.llm.examples import Message
from experiments.llm.options import AdapterPath, DrawingOptions, ModelPath
from experiments.models.generation import read_prompts, read_token

_DESCRIPTION = """\
A conversation with a model, with its adapter merged, or without --adapter as it is. Each
line is a message; the answer appears as it is written. An empty line, or the end of the
input, ends the conversation.
"""

_EXAMPLES = """\
examples:
  python -m experiments.llm_lora chat --adapter runs/llm_lora/adapter
  python -m experiments.llm_lora chat --model path/to/Llama-3.2-1B-Instruct --temperature 0.7
"""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Who answers, and how."""

    adapter: AdapterPath = None
    model: ModelPath = None
    system: Annotated[str | None, Option("what the conversation begins with", metavar="TEXT")] = (
        None
    )
    max_length: Annotated[
        int, Option("tokens of a conversation, its last answer included", positive_int)
    ] = 2048
    drawing: DrawingOptions = DrawingOptions()


def parsed_for_chat(arguments: Sequence[str]) -> ChatOptions:
    """Returns the options after `chat`; exits, as argparse does, if one is wrong."""
    return parsed_as(
        ChatOptions,
        arguments,
        command="llm_lora chat",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )


def chat(options: ChatOptions) -> None:
    """Answers line by line."""
    keep_programs()
    writer = Writer.read(options.adapter, options.model, Console.beside_output())
    answerer = Answerer(writer, options)
    messages: list[Message] = []
    if options.system is not None:
        messages.append({"role": "system", "content": options.system})
    while line := _read_line():
        messages.append({"role": "user", "content": line})
        answer = ""
        for piece in answerer.pieces(messages):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer.strip()})


class Answerer:
    """Writes an answer piece by piece."""

    def __init__(self, writer: Writer, options: ChatOptions) -> None:
        """Compiles nothing yet: the first answer does."""
        most = writer.model.greatest_length
        self._writer = writer
        self._capacity = min(options.max_length, most)
        self._sampling = options.drawing.sampling
        self._key = jax.random.key(options.drawing.seed)
        self._drawn = 0
        # Weights that are not adapted may still be quantised.
        apply = lora_jax.adapt(writer.network.apply)
        self._read_prompts = jax.jit(
            functools.partial(read_prompts, apply), static_argnames="new_tokens"
        )
        self._read_token = jax.jit(functools.partial(read_token, apply))
        self._draw = jax.jit(self._sampling.drawn)

    def pieces(self, messages: Sequence[Message]) -> Iterator[str]:
        """Yields the answer to the last message, as far as it is whole characters.

        Raises:
          InputError: the conversation is too long.
        """
        texts, params = self._writer.texts, self._writer.params
        prompt = texts.question(messages)
        tokens, lengths = filled_up([prompt], rows=1)
        if tokens.shape[1] >= self._capacity:
            raise InputError(
                f"the conversation has {len(prompt)} tokens, and there is room for "
                f"{self._capacity}; pass a larger --max-length, or begin again"
            )
        new_tokens = self._capacity - tokens.shape[1]
        logits, cache = self._read_prompts(params, tokens, lengths, new_tokens=new_tokens)
        written: list[int] = []
        shown = ""
        for _ in range(new_tokens):
            token = int(self._draw(logits, jax.random.fold_in(self._key, self._drawn))[0])
            self._drawn += 1
            if token in texts.tokenizer.end_ids:
                return
            written.append(token)
            text = texts.tokenizer.decoded(written)
            # A character may be several tokens: until it is whole, it is this sign.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
            logits, cache = self._read_token(params, jnp.array([token]), cache)


def _read_line() -> str:
    """Returns a line of standard input, after a sign on a terminal; empty at its end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()
