"""A run of a study from its first line to its results: every command begins and ends here."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.common.claims import Claim, check
from experiments.common.console import Console, device_line
from experiments.common.files import writable_folder, write_json
from experiments.common.programs import keep_programs
from experiments.common.shared_options import FolderOptions, OutputOptions
from experiments.common.timing import Stopwatch


class Run:
    """What is shown, timed and written while a study runs.

    Attributes:
      console: where the study shows what it does; not standard output, where that is for JSON.
    """

    def __init__(self, output: OutputOptions) -> None:
        """Says which device computes, starts the clock, and has compiled programs kept.

        Args:
          output: what the caller chose; with a `FolderOptions` the results are written too.

        Raises:
          InputError: the folder can't be written.
        """
        keep_programs()
        self.console = Console(to_stderr=output.json)
        self.console.note(device_line())
        self._output = output
        self._watch = Stopwatch()
        if isinstance(output, FolderOptions):
            writable_folder(output.out, "--out")

    def phase_ended(self, name: str) -> None:
        """Adds the time since the last phase ended to the seconds of this one."""
        self._watch.phase_ended(name)

    def finish(
        self,
        results: Mapping[str, Any],
        *,
        claims: Iterable[Claim] = (),
        draw: Callable[[Path], None] | None = None,
        file: str = "metrics.json",
    ) -> None:
        """Draws the pictures, writes the results, prints them where JSON is asked for.

        Args:
          results: what the study found, as JSON can hold it; where they are written, the seconds
            of each phase are added.
          claims: what must hold; checked last, so that the results are there to look at.
          draw: draws the pictures into a folder.
          file: the name of the results' file.

        Raises:
          RuntimeError: a claim does not hold.
        """
        if isinstance(self._output, FolderOptions):
            results = self._written(results, self._output, draw, file)
        if self._output.json:
            print(json.dumps(results, indent=2))
        check(claims)

    def _written(
        self,
        results: Mapping[str, Any],
        output: FolderOptions,
        draw: Callable[[Path], None] | None,
        file: str,
    ) -> dict[str, Any]:
        if draw is not None and not output.no_plots:
            draw(output.out)
            self.phase_ended("plots")
        seconds = self._watch.seconds()
        results = {**results, "seconds": seconds}
        write_json(output.out / file, results)
        self.console.note(f"Results are in {output.out} ({seconds['total']:.0f} seconds)")
        return results
