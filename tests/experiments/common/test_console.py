"""What a file gets is short; what standard output gets may be JSON alone."""

from experiments.common.console import Console, device_line


def test_a_file_gets_one_line_for_a_thousand_steps(capsys):
    with Console().progress("Training", 1000) as progress:
        for _ in range(1000):
            progress.advance()
        progress.show("loss 0.5")
    shown = capsys.readouterr().out
    assert shown.startswith("Training: 1,000 in ")
    assert shown.endswith("loss 0.5\n")
    assert shown.count("\n") == 1
    assert "\x1b" not in shown


def test_a_part_of_a_longer_progress_shows_none_of_its_own(capsys):
    console = Console()
    with console.without_progress().progress("Training", 10) as progress:
        progress.advance()
        progress.show("loss 0.5")
    assert capsys.readouterr().out == ""
    with console.progress("Training", 10):
        pass
    assert capsys.readouterr().out.startswith("Training: ")


def test_standard_output_can_be_left_alone(capsys):
    console = Console(to_stderr=True)
    console.note("note")
    console.warn("title", "warning")
    console.table(["name", "value"], [["[bold]", "1"]])
    shown = capsys.readouterr()
    assert shown.out == ""
    assert all(text in shown.err for text in ("note", "title", "warning", "[bold]"))


def test_the_device_is_told():
    assert "backend cpu" in device_line()
