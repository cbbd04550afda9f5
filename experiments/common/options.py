"""The command line of a study, written once: as a dataclass whose fields are the options.

`batch_size: Annotated[int, Option("examples in a step", type=positive_int)] = 10` is the option
`--batch-size`, with its help, its type and its default. A field without a default is required, a
bool is a flag, and a field that is itself such a dataclass is a group of options. Options that
several studies have are in `shared_options`.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from experiments.common.errors import EXIT_BAD_INPUT

Chosen = TypeVar("Chosen")


@dataclass(frozen=True)
class Option:
    """What an option is besides its name and its default, which are those of its field.

    Attributes:
      help: one line that explains it; a default that is a value is added to it.
      type: makes a value of one argument, and raises `argparse.ArgumentTypeError` otherwise.
      several: whether it takes one or more arguments, which become a tuple.
      repeated: whether it may be given more than once; the arguments become a tuple.
      choices: the only values that are allowed.
      metavar: what help calls the argument.
    """

    help: str
    type: Callable[[str], Any] = str
    several: bool = False
    repeated: bool = False
    choices: Iterable[Any] | None = None
    metavar: str | None = None


def parsed_as(
    options: type[Chosen],
    arguments: Sequence[str] | None,
    *,
    command: str,
    description: str,
    examples: str | None = None,
) -> Chosen:
    """Returns what the arguments choose.

    Args:
      options: a dataclass as the module's docstring describes it.
      arguments: those of the command line; the process's own if None.
      command: what follows `python -m experiments.`.
      description: what `--help` begins with.
      examples: what `--help` ends with.

    Raises:
      SystemExit: an argument is wrong, or asks for help; argparse has printed what it has to say.
    """
    parser = Parser(
        prog=f"python -m experiments.{command}", description=description, epilog=examples
    )
    _add_options(parser, options, None)
    return _built(options, vars(parser.parse_args(arguments)))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's paragraphs, and shows each option's default if it has one.

    A text that says itself what the default is, in words, stays as it is.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        help_text = action.help or ""
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS:
            return help_text
        if "(default" in help_text:
            return help_text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{help_text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """An argument parser whose help shows defaults, and whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message} (see `{self.prog} --help`)\n")


def _add_options(target: argparse._ActionsContainer, options: type, defaults: Any) -> None:
    """Adds an argument for each field; `defaults` is an instance to take defaults from, or None."""
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        default = field.default if defaults is None else getattr(defaults, field.name)
        if get_origin(hint) is Annotated:
            _add_option(target, field.name, hint, default)
        elif dataclasses.is_dataclass(hint):
            group = target.add_argument_group(field.name.replace("_", " "))
            _add_options(group, hint, None if default is MISSING else default)
        else:
            raise TypeError(
                f"{options.__name__}.{field.name} is annotated as {hint}; expected "
                "Annotated[type, Option(...)], or a dataclass of options"
            )


def _add_option(target: argparse._ActionsContainer, name: str, hint: Any, default: Any) -> None:
    kind, *others = get_args(hint)
    (option,) = (other for other in others if isinstance(other, Option))
    keywords: dict[str, Any] = {"help": option.help}
    if default is MISSING:
        keywords["required"] = True
    else:
        keywords["default"] = default
    if kind is bool:
        keywords["action"] = "store_true"
    else:
        keywords |= {"type": option.type, "metavar": option.metavar}
        keywords |= {"choices": option.choices} if option.choices is not None else {}
        keywords |= {"nargs": "+"} if option.several else {}
        keywords |= {"action": "append"} if option.repeated else {}
    target.add_argument(f"--{name.replace('_', '-')}", **keywords)


def _built(options: type[Chosen], values: dict[str, Any]) -> Chosen:
    hints = get_type_hints(options, include_extras=True)
    chosen = {}
    for field in dataclasses.fields(options):
        if get_origin(hints[field.name]) is Annotated:
            value = values[field.name]
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
        else:
            chosen[field.name] = _built(hints[field.name], values)
    return options(**chosen)


def existing_folder(text: str) -> Path:
    """Returns the folder of this name; a type of options."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return Path(text)


def number(
    kind: type[int] | type[float], accepts: Callable[[float], bool], expected: str
) -> Callable[[str], Any]:
    """Returns a type of options: numbers of this kind that `accepts` allows."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return read


positive_int = number(int, lambda value: value >= 1, "a whole number of at least 1")
seed_number = number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")
not_negative = number(float, lambda value: 0 <= value < float("inf"), "a number of at least 0")
positive_float = number(float, lambda value: 0 < value < float("inf"), "a number above 0")
fraction = number(float, lambda value: 0 <= value <= 1, "a fraction from 0 to 1")


def count_or_all(text: str) -> int | None:
    """Returns a whole number of at least 1, or None for `all`; a type of options."""
    return None if text == "all" else positive_int(text)
