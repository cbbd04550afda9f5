"""`python -m tests.battery`."""

from tests.battery.__main__ import main


def test_lists_the_rows_that_an_expression_matches(capsys):
    assert main(["--list", "--all", "--only", r"structure.transposed \| in,out \| lora"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == 8
    assert all(name.startswith("structure.transposed | in,out | lora | ") for name in names)


def test_says_when_nothing_matches(capsys):
    assert main(["--only", "no such op"]) == 2
    assert "'no such op'" in capsys.readouterr().err
