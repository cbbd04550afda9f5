"""What the reader of a study sees: tables, progress bars, and lines that can't be missed."""

import contextlib
import copy
from collections.abc import Iterator, Sequence

import jax
from rich import box
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from experiments.common.errors import raise_if_interrupted

_REDRAWS_PER_SECOND = 4
_UPDATES = 500
# Where output is a file, a table must not be folded to the width of a screen that isn't there.
_FILE_WIDTH = 110


class Steps:
    """The progress of one phase; cheap enough to advance in an inner loop."""

    def __init__(self, bar: Progress, task: TaskID, total: int) -> None:
        self._bar = bar
        self._task = task
        self._stride = max(1, total // _UPDATES)
        self._done = 0

    def advance(self) -> None:
        raise_if_interrupted()
        self._done += 1
        if self._done % self._stride == 0:
            self._bar.update(self._task, completed=self._done)

    def show(self, note: str) -> None:
        """Puts a note, such as the running loss, beside the bar."""
        self._bar.update(self._task, note=note)

    def finish(self) -> None:
        self._bar.update(self._task, completed=self._done)

    def __str__(self) -> str:
        task = self._bar.tasks[self._task]
        line = f"{task.description}: {self._done:,} in {task.elapsed or 0:.1f} s"
        return f"{line}, {note}" if (note := task.fields["note"]) else line


class Console:
    """Shows text to a reader: on standard output, or on standard error if that is for JSON."""

    def __init__(self, *, to_stderr: bool = False) -> None:
        self._rich = RichConsole(stderr=to_stderr, highlight=False)
        if not self._rich.is_terminal:
            self._rich.width = max(self._rich.width, _FILE_WIDTH)
        self._shows_progress = True

    @classmethod
    def beside_output(cls) -> "Console":
        """Returns one on standard error for a command whose output is for other programs.

        It shows progress on a terminal alone, so that an error elsewhere is one line.
        """
        console = cls(to_stderr=True)
        return console if console.is_terminal else console.without_progress()

    def without_progress(self) -> "Console":
        """Returns a console that shows no progress, for a part of a task that has a bar already."""
        console = copy.copy(self)
        console._shows_progress = False
        return console

    @property
    def is_terminal(self) -> bool:
        return self._rich.is_terminal

    def note(self, message: str) -> None:
        self._rich.print(Text(message), soft_wrap=True)

    def rule(self, title: str) -> None:
        self._rich.rule(Text(title, style="bold"), align="left")

    def warn(self, title: str, message: str) -> None:
        self._rich.print(Panel(Text(message), title=f"[bold]{title}[/]", border_style="yellow"))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints rows of text, the first column left-aligned and the others right-aligned."""
        table = Table(box=box.SIMPLE_HEAD)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        self._rich.print(table)

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[Steps]:
        """Shows a bar on a terminal, and one line at the end where output is a file or a pipe."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._rich,
            refresh_per_second=_REDRAWS_PER_SECOND,
            disable=not (self.is_terminal and self._shows_progress),
        )
        with bar:
            steps = Steps(bar, bar.add_task(description, total=total, note=""), total)
            yield steps
            steps.finish()
        if self._shows_progress and not self.is_terminal:
            self.note(str(steps))


def device_line() -> str:
    """Returns JAX's version, backend and device in one line."""
    return f"JAX {jax.__version__}, backend {jax.default_backend()}, device {device_name()}"


def device_name() -> str:
    device = jax.devices()[0]
    return f"{device.platform}: {device.device_kind}"
