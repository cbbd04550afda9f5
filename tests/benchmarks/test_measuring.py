"""The file of all numbers says which command found them."""

import contextlib
import importlib
import json

import pytest

from benchmarks.measuring import MeasuringParser, write_found

COMMANDS = (
    "compiled_cost",
    "limit",
    "llama_cpp",
    "mnist_step",
    "quantized",
    "quantized_accuracy",
    "scale.__main__",
    "serving",
)


def test_a_file_begins_with_the_command_and_what_computed(tmp_path):
    parser = MeasuringParser("some", "Measures.")
    parser.add_argument("--note")
    file = tmp_path / "found.json"
    options = parser.parse_args(["--note", "two words", "--json", str(file)])
    write_found(options, {"number": 3})
    found = json.loads(file.read_text())
    assert found["commands"] == [f"python -m benchmarks.some --note 'two words' --json {file}"]
    assert found["made_on"]["cores"] > 0
    assert found["number"] == 3


def test_no_file_is_written_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmarks/some.py"])
    options = MeasuringParser("some", "Measures.").parse_args()
    assert options.command == "python -m benchmarks.some"
    write_found(options, {"number": 3})
    assert not list(tmp_path.iterdir())


def test_a_file_that_can_not_be_written_is_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        MeasuringParser("some", "Measures.").parse_args(["--json", f"{tmp_path}/file/found.json"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: argument --json: its folder ")


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_measure_have_the_option(name, capsys):
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert "--json FILE" in capsys.readouterr().out
