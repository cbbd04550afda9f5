"""The finished cells of a grid on disk, so that an interrupted study goes on where it was."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.console import Console
from experiments.output import write_json

Settings = Mapping[str, Any]
Result = Mapping[str, Any]


@dataclass(frozen=True)
class CellStore:
    """A folder with a JSON file for each finished cell.

    A cell is known by all the settings that decide its result, and by nothing else, so that a
    changed setting finds nothing and the former setting finds its cells again.

    Attributes:
      folder: where the files are; made when the first cell is saved.
      console: a file that can't be read is told here.
    """

    folder: Path
    console: Console

    def save(self, settings: Settings, result: Result) -> None:
        """Writes a cell; its file appears when it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(settings), {"settings": dict(settings), "result": dict(result)})

    def load(self, settings: Settings) -> Result | None:
        """Returns the result of the cell with exactly these settings, or None."""
        path = self._path(settings)
        try:
            stored = json.loads(path.read_text())
            return stored["result"] if stored["settings"] == _as_stored(settings) else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.console.warn(
                "a stored cell can't be read", f"Computing it again: {path} ({error!r})"
            )
            return None

    def discard(self, settings: Settings) -> None:
        """Deletes the cell with these settings, if it is there."""
        self._path(settings).unlink(missing_ok=True)

    def _path(self, settings: Settings) -> Path:
        canonical = json.dumps(settings, sort_keys=True)
        return self.folder / f"{hashlib.sha256(canonical.encode()).hexdigest()[:24]}.json"


def _as_stored(settings: Settings) -> Any:
    """Returns the settings as they come back from a file: tuples as lists."""
    return json.loads(json.dumps(settings))
