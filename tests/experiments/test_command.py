"""Errors are one line, and the exit code says whose fault it was."""

import pytest

from experiments.command import (
    Parser,
    exit_code,
    fraction,
    positive_float,
    positive_int,
    seed,
)
from experiments.errors import InputError


def raising(error):
    def study():
        raise error

    return study


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("--rank is\n wrong"), 2),
        (OSError("disk full"), 1),
        (ValueError("bad"), 1),
        (RuntimeError("bad"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_line_and_have_their_exit_code(error, code, capsys):
    assert exit_code(raising(error)) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1


def test_success_is_zero_and_bugs_keep_their_traceback():
    assert exit_code(lambda: None) == 0
    with pytest.raises(AttributeError):
        exit_code(raising(AttributeError("a bug")))


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive_int, ["1", "7"], ["0", "-1", "1.5", "x"]),
        (seed, ["0", "4294967295"], ["-1", "4294967296", "x"]),
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
