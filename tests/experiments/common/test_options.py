"""A dataclass is a command line: names, types, defaults, groups, and errors of one line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from experiments.common.errors import exit_code
from experiments.common.options import (
    Option,
    Parser,
    fraction,
    parsed_as,
    positive_float,
    positive_int,
    seed_number,
)

Names = Annotated[tuple[str, ...], Option("the names", several=True, metavar="NAME")]


@dataclass(frozen=True, kw_only=True)
class Where:
    """A group of options."""

    out_dir: Annotated[Path, Option("the folder", Path)] = Path("elsewhere")
    text: Annotated[tuple[str, ...] | None, Option("a text", repeated=True)] = None


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Options with and without a default, and a group with a default of its own."""

    rank: Annotated[int, Option("the rank", positive_int)]
    names: Names = ("one", "two")
    kind: Annotated[str, Option("the kind", choices=("a", "b"))] = "a"
    again: Annotated[bool, Option("do it again")] = False
    where_to: Where = Where(out_dir=Path("here"))


def chosen(*arguments):
    return parsed_as(
        Chosen, arguments, command="study", description="What it does.", examples="examples: one"
    )


def test_without_arguments_a_dataclass_has_its_own_defaults():
    assert chosen("--rank", "3") == Chosen(rank=3)
    assert chosen("--rank", "3").where_to.out_dir == Path("here")


def test_arguments_become_values_of_the_annotated_types():
    found = chosen(
        *("--rank", "3", "--names", "x", "y", "--kind", "b", "--again"),
        *("--out-dir", "there", "--text", "first", "--text", "second"),
    )
    where = Where(out_dir=Path("there"), text=("first", "second"))
    assert found == Chosen(rank=3, names=("x", "y"), kind="b", again=True, where_to=where)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --rank"),
        (["--rank", "0"], "argument --rank: '0' is not a whole number of at least 1"),
        (["--rank", "1", "--kind", "c"], "argument --kind: invalid choice: 'c'"),
        (["--rank", "1", "--names"], "argument --names: expected at least one argument"),
        (["--rank", "1", "--out"], "argument --out-dir: expected one argument"),
        (["--rank", "1", "--other"], "unrecognized arguments: --other"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert exit_code(lambda: chosen(*arguments)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.endswith("(see `python -m experiments.study --help`)\n")
    assert shown.count("\n") == 1


def test_a_field_that_is_no_option_is_named():
    @dataclass(frozen=True)
    class Forgotten:
        rank: int = 1

    with pytest.raises(TypeError, match=r"Forgotten\.rank is annotated as .*; expected Annotated"):
        parsed_as(Forgotten, [], command="study", description="")


def test_help_has_the_description_the_groups_the_defaults_and_the_examples(capsys):
    assert exit_code(lambda: chosen("--help")) == 0
    shown = capsys.readouterr().out
    for text in (
        "usage: python -m experiments.study",
        "What it does.",
        "the names (default: one two)",
        "\nwhere to:\n",
        "the folder (default: here)",
        "examples: one",
    ):
        assert text in shown


def test_help_says_each_default_once(capsys):
    parser = Parser(prog="study")
    parser.add_argument("--rank", default=0, help="the rank")
    parser.add_argument("--machine", default="here", help="where (default: this one)")
    parser.print_help()
    shown = capsys.readouterr().out
    assert "the rank (default: 0)" in shown
    assert "where (default: this one)\n" in shown


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive_int, ["1", "7"], ["0", "-1", "1.5", "x"]),
        (seed_number, ["0", "4294967295"], ["-1", "4294967296", "x"]),
        (positive_float, ["0.1", "3"], ["0", "-1", "nan", "inf", "x"]),
        (fraction, ["0", "0.5", "1"], ["-0.1", "1.1", "nan", "x"]),
    ],
)
def test_argument_types_name_what_came_and_what_was_expected(kind, good, bad, capsys):
    parser = Parser(prog="study")
    parser.add_argument("--value", type=kind)
    for text in good:
        assert parser.parse_args(["--value", text]).value == float(text)
    for text in bad:
        assert exit_code(lambda text=text: parser.parse_args([f"--value={text}"])) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: argument --value: ")
        assert repr(text) in shown
        assert shown.count("\n") == 1


def test_help_tells_every_default_that_is_a_value():
    parser = Parser(prog="study")
    parser.add_argument("--seed", default=0, help="the seed")
    parser.add_argument("--ranks", default=[1, 2], help="the ranks")
    parser.add_argument("--digit", default=None, help="the digit")
    parser.add_argument("--json", action="store_true", help="the format")
    shown = parser.format_help()
    for line in ("the seed (default: 0)\n", "the ranks (default: 1 2)\n", "digit\n", "format\n"):
        assert line in shown
