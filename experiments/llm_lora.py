"""Fine-tunes a language model on conversations with adapters, and writes with the result."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments.common.errors import exit_code
from experiments.common.memory import keep_freed_memory
from experiments.common.run import Run
from experiments.llm.chatting import chat, parsed_for_chat
from experiments.llm.evaluating import evaluate, parsed_for_evaluating
from experiments.llm.exporting import export, parsed_for_exporting
from experiments.llm.options import Options, parsed
from experiments.llm.single import train_once
from experiments.llm.writing import parsed_for_writing, write


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study with these arguments and returns the exit code of the process."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in _COMMANDS:
        parsed_for, command = _COMMANDS[arguments[0]]
        return exit_code(lambda: command(parsed_for(arguments[1:])))
    return exit_code(lambda: study(parsed(arguments)))


def study(options: Options) -> None:
    """Trains once and reports on it."""
    train_once(options, Run(options.output))


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], Any], Callable[[Any], None]]] = {
    "generate": (parsed_for_writing, write),
    "chat": (parsed_for_chat, chat),
    "evaluate": (parsed_for_evaluating, evaluate),
    "export": (parsed_for_exporting, export),
}


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
