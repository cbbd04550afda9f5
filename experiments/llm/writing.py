"""What a trained adapter writes: the command line of `llm_lora generate`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.common.options import Option, parsed_as
from experiments.common.programs import keep_programs
from experiments.llm.answers import Writer
from experiments.llm.options import DrawingOptions, ModelPath, NewTokens
from experiments.llm.texts import Texts

_DESCRIPTION = """\
Writes an answer to each prompt: what the model writes with its adapter merged, or
without --adapter as it is. Several adapters of one model answer in one batch, without
being merged. The prompts are those of --prompt, or the lines of standard input; each is
a message of a user, or with --plain a text that the model continues.
"""

_EXAMPLES = """\
examples:
  python -m experiments.llm_lora generate --prompt "What is the capital of France?"
  python -m experiments.llm_lora generate --adapter runs/llm_lora/adapter --prompt "Hello"
  python -m experiments.llm_lora generate --adapter runs/llm_lora/adapter --json < prompts.txt
  python -m experiments.llm_lora generate --adapter runs/a/adapter runs/b/adapter --prompt "Hello"
"""

_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """What to answer, and with what."""

    adapter: Annotated[
        tuple[Path, ...],
        Option(
            "the folder `adapter` in the --out of a training; several answer in one batch",
            Path,
            several=True,
            metavar="DIR",
        ),
    ] = ()
    model: ModelPath = None
    prompt: Annotated[
        tuple[str, ...] | None,
        Option(
            "a prompt; may be repeated (default: the lines of standard input)",
            repeated=True,
            metavar="TEXT",
        ),
    ] = None
    plain: Annotated[bool, Option("continue prompts as they are, without the chat template")] = (
        False
    )
    new_tokens: NewTokens = 128
    drawing: DrawingOptions = DrawingOptions()
    json: Annotated[bool, Option("print a JSON object in each line")] = False


def parsed_for_writing(arguments: Sequence[str]) -> WritingOptions:
    """Returns the options after `generate`; exits, as argparse does, if one is wrong."""
    return parsed_as(
        WritingOptions,
        arguments,
        command="llm_lora generate",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )


def write(options: WritingOptions) -> None:
    """Prints the answer to each prompt."""
    keep_programs()
    prompts = _prompts(options.prompt)
    console = Console.beside_output()
    several = len(options.adapter) > 1
    writer = (
        Writer.of_several(options.adapter, options.model, console)
        if several
        else Writer.read(next(iter(options.adapter), None), options.model, console)
    )
    answers = writer.answers(
        [_encoded(writer.texts, prompt, plain=options.plain) for prompt in prompts],
        new_tokens=options.new_tokens,
        rows=min(len(prompts), _ROWS),
        console=console,
        sampling=options.drawing.sampling,
        seed=options.drawing.seed,
    )
    names = [str(adapter) for adapter in options.adapter] or [None]
    for prompt, own in zip(prompts, answers, strict=True):
        for name, answer in zip(names, own, strict=True):
            print(_line(prompt, name, answer, several=several, as_json=options.json))


def _line(prompt: str, name: str | None, answer: str, *, several: bool, as_json: bool) -> str:
    if as_json:
        return json.dumps({"prompt": prompt, "adapter": name, "answer": answer})
    return f"{name}: {answer}" if several else answer


def _encoded(texts: Texts, prompt: str, *, plain: bool) -> np.ndarray:
    if plain:
        return texts.prompt(prompt)
    return texts.question([{"role": "user", "content": prompt}])


def _prompts(given: Sequence[str] | None) -> list[str]:
    """Returns the prompts of --prompt, or the lines of standard input that are not blank."""
    lines = sys.stdin.read().splitlines() if given is None else given
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise InputError("there is no prompt; pass --prompt TEXT, or lines on standard input")
    return prompts
